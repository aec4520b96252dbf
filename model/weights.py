"""The tensors of a checkpoint: Hugging Face's Qwen3-MoE names on disk, stacked experts in memory. Knows no folders.

What Qwen3-MoE lacks is named in its manner: ``mlp.group_gate`` is the first of two levels of gating; a plain expert has
no ``gate_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer


class WrongWeights(ValueError):
    """The file's tensors are not those of the configuration. One clause that says which."""


def dump(model: Transformer) -> bytes:
    """The model's weights, rounded to bfloat16, as the bytes of a safetensors file."""
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in _named(model)}
    return to_bytes(tensors, metadata={"format": "pt"})


def read(path: Path, config: ModelConfig) -> Transformer:
    """A model in float32 with the file's weights: exact keys, shapes and dtype, all finite. Raises WrongWeights."""
    # A configuration may claim any size, and a model of it would be made first. A tensor that lacks is named below.
    if (size := path.stat().st_size) < config.num_parameters:
        raise WrongWeights(f"it has {size:,} bytes, and {config.num_parameters:,} parameters take two each")
    # Not on the meta device: to draw a normal number there imports a compiler of 800 modules, which takes a second.
    model = Transformer(config)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), {name for name, _ in _named(model)})
            for name, destination in _named(model):
                destination.detach().copy_(_checked(name, file.get_tensor(name), destination))
    except SafetensorError as error:
        raise WrongWeights(f"it is no whole safetensors file ({error})") from None
    return model.requires_grad_(False)


def _named(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file under its name there; slices of stacked weights are views, so they can be written to."""
    yield "model.embed_tokens.weight", model.embedding.weight
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight
        for theirs, weight in {
            "q_proj": layer.attention.query.weight,
            "k_proj": layer.attention.key.weight,
            "v_proj": layer.attention.value.weight,
            "o_proj": layer.attention.out.weight,
            "q_norm": layer.attention.query_norm.weight,
            "k_norm": layer.attention.key_norm.weight,
        }.items():
            yield f"{prefix}.self_attn.{theirs}.weight", weight
        yield f"{prefix}.post_attention_layernorm.weight", layer.moe_norm.weight
        yield f"{prefix}.mlp.gate.weight", layer.moe.router.weight
        if model.config.num_groups > 1:
            yield f"{prefix}.mlp.group_gate.weight", layer.moe.router.group_weight
        for expert in range(model.config.num_experts):
            experts = layer.moe.experts
            if model.config.activation == "swiglu":
                yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", experts.gate_up[expert, 0]
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", experts.gate_up[expert, -1]
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", experts.down[expert]
    yield "model.norm.weight", model.norm.weight
    yield "lm_head.weight", model.head.weight


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        problem = "has no" if wanted - found else "has an unknown"
        raise WrongWeights(f"it {problem} {min(wanted - found or found - wanted)}")


def _checked(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape:
        raise WrongWeights(f"{name} has shape {list(tensor.shape)}, not {list(like.shape)}")
    if tensor.dtype != torch.bfloat16:
        raise WrongWeights(f"{name} is {tensor.dtype}, not torch.bfloat16")
    if not tensor.isfinite().all():
        raise WrongWeights(f"{name} has values that are not finite")
    return tensor
