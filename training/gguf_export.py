"""A checkpoint as one GGUF file, for llama.cpp and what is built on it. Knows no training.

llama.cpp's ``qwen3moe`` is the function of ``ModelConfig`` up to ``context_length`` positions: it has no window, so the
file names that length as the most it was made for. It normalises the chosen experts' weights without being told.

Letters: V vocabulary, C channels, E experts, F expert size.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.tokenizer import BYTE_LETTERS, Tokenizer
from model.transformer import Transformer
from training import Refused

ARCHITECTURE = "qwen3moe"
END = "<|endoftext|>"
NO_MERGE = "\u2205 \u2205"
"""llama.cpp insists on a list of merges and the library writes no empty one; this joins what no byte is written as."""

DType = Literal["f32", "bf16", "q8_0"]
"""What matrices are written as. Weights are bfloat16 in a checkpoint, so the first two are exact; q8_0 rounds."""

_KINDS: dict[DType, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


class NoCounterpart(Refused):
    """llama.cpp computes nothing like this model. One sentence that names the field in the way."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE: its tokens in order of their ids, and its merges in order of their rank."""

    tokens: Sequence[str]
    merges: Sequence[str]


def export(loaded: Checkpoint, path: Path, dtype: DType = "f32") -> None:
    """Write a loaded checkpoint to a new GGUF file. Raises NoCounterpart and FileExistsError."""
    require_counterpart(loaded.config)
    vocabulary = vocabulary_of(loaded.tokenizer)
    if path.exists():
        raise FileExistsError(f"{path} exists; an export is always a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        _write(Path(temporary), loaded, vocabulary, dtype)
        Path(temporary).chmod(0o644)
        Path(temporary).rename(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def require_counterpart(config: ModelConfig) -> None:
    """Raises NoCounterpart."""
    for field in config.foreign_fields:
        raise NoCounterpart(f"{field} is {getattr(config, field)!r}; llama.cpp's {ARCHITECTURE} has nothing like it")


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The same tokens for a byte-level BPE. Raises NoCounterpart for another kind of tokenizer."""
    rule = json.loads(tokenizer.files()["tokenizer.json"])
    kind = rule["model"]["type"]
    if kind == "WordLevel" and all(len(token) == 1 for token in tokenizer.tokens):
        spelled = [_spelling(token) for token in tokenizer.tokens]
        merges = {merge for each in spelled for merge in _merges(each)}
        return Vocabulary(spelled, sorted(merges, key=lambda merge: (len(merge), merge)))  # a set has no order
    if kind == "BPE" and _is_plain_byte_level(rule):
        ranked = [merge if isinstance(merge, str) else " ".join(merge) for merge in rule["model"]["merges"]]
        ids: dict[str, int] = rule["model"]["vocab"]
        return Vocabulary(sorted(ids, key=ids.__getitem__), ranked)
    raise NoCounterpart(
        f"tokenizer.json's model.type is {kind!r} in a form that is neither characters nor GPT-2's bytes"
    )


def _is_plain_byte_level(rule: dict[str, Any]) -> bool:
    """GPT-2's own: every other normalizer or way to split would spell some texts otherwise than llama.cpp."""
    splits = rule["pre_tokenizer"] or {}
    usual = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return not rule["normalizer"] and all(splits.get(name) == value for name, value in usual.items())


def _spelling(character: str) -> str:
    """A character's UTF-8 bytes, each as the printable character that stands for it in GPT-2's vocabulary."""
    return "".join(BYTE_LETTERS[byte] for byte in character.encode())


def _merges(spelled: str) -> Iterator[str]:
    """What joins the bytes of one character from left to right; nothing for a single one."""
    for length in range(1, len(spelled)):
        yield f"{spelled[:length]} {spelled[length]}"


def _write(path: Path, loaded: Checkpoint, vocabulary: Vocabulary, dtype: DType) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(loaded.manifest.name)
    _add_shape(writer, loaded.config)
    _add_vocabulary(writer, vocabulary)
    matrices, file_type = _KINDS[dtype]
    block, _ = gguf.GGML_QUANT_SIZES[matrices]
    writer.add_file_type(file_type)
    with torch.no_grad():
        for name, tensor in tensors_of(loaded.model):
            # Rounding norms, router or head would save next to nothing; the end's row has to stay exact.
            exact = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight") or name == "output.weight"
            # Numbers that share a scale lie in one row, so rows of no whole number of blocks cannot be written so.
            kind = gguf.GGMLQuantizationType.F32 if exact or tensor.shape[-1] % block else matrices
            data = gguf.quants.quantize(tensor.float().cpu().contiguous().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.expert_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.expert_size)
    writer.add_expert_weights_norm(True)
    writer.add_vocab_size(config.vocab_size + 1)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Ours has no end of text. llama.cpp would take token 11 for it, a semicolon of ours, so one is added."""
    count = len(vocabulary.tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocabulary.tokens, END])
    writer.add_token_types([gguf.TokenType.NORMAL] * count + [gguf.TokenType.CONTROL])
    writer.add_token_merges(vocabulary.merges or [NO_MERGE])
    writer.add_bos_token_id(count)
    writer.add_eos_token_id(count)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def tensors_of(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the file; the experts of a layer are stacked (E, F, C) and (E, C, F)."""
    rows = model.embedding.weight  # (V, C)
    yield "token_embd.weight", torch.cat((rows, torch.zeros_like(rows[:1])))
    for index, layer in enumerate(model.layers):
        prefix = f"blk.{index}"
        yield f"{prefix}.attn_norm.weight", layer.attention_norm.weight
        yield f"{prefix}.attn_q.weight", layer.attention.query.weight
        yield f"{prefix}.attn_k.weight", layer.attention.key.weight
        yield f"{prefix}.attn_v.weight", layer.attention.value.weight
        yield f"{prefix}.attn_output.weight", layer.attention.out.weight
        yield f"{prefix}.attn_q_norm.weight", layer.attention.query_norm.weight
        yield f"{prefix}.attn_k_norm.weight", layer.attention.key_norm.weight
        yield f"{prefix}.ffn_norm.weight", layer.moe_norm.weight
        yield f"{prefix}.ffn_gate_inp.weight", layer.moe.router.weight
        yield f"{prefix}.ffn_gate_exps.weight", layer.moe.experts.gate_up[:, 0]
        yield f"{prefix}.ffn_up_exps.weight", layer.moe.experts.gate_up[:, 1]
        yield f"{prefix}.ffn_down_exps.weight", layer.moe.experts.down
    yield "output_norm.weight", model.norm.weight
    head = model.head.weight
    # The mean of all rows: its logit is the mean logit, so the end is never the likeliest token.
    yield "output.weight", torch.cat((head, head.mean(dim=0, keepdim=True)))
