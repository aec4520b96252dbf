"""The shape of a model, and its translation to and from a Hugging Face ``config.json``. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MAX_POSITIONS = 65_536
MAX_SIZE = 2**24
MAX_PARAMETERS = 2**36


class UnsupportedConfig(ValueError):
    """A ``config.json`` asks for something this code does not compute."""


@dataclass(frozen=True)
class ModelConfig:
    """A sparse mixture-of-experts decoder; exactly the family Hugging Face calls Qwen3-MoE.

    Every layer attends over the last ``context_length`` positions, itself included, and routes each token to
    ``experts_per_token`` of ``num_experts`` SwiGLU experts of width ``expert_size``.
    """

    vocab_size: int
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 256
    context_length: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = float if field.name in ("rope_theta", "rms_norm_eps") else int
            _require(type(value) is kind, f"{field.name} is {value!r}; it must be a number of kind {kind.__name__}")
            # Written so that NaN is out of range as well.
            _require(0 < value <= MAX_SIZE, f"{field.name} is {value}; it must be above 0 and at most {MAX_SIZE:,}")
        for name in ("hidden_size", "expert_size", "head_dim"):
            _require(getattr(self, name) % 16 == 0, f"{name} is {getattr(self, name)}; it must be a multiple of 16")
        _require(self.head_dim >= 32, f"head_dim is {self.head_dim}; it must be at least 32")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, which is {self.num_kv_heads}",
        )
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token is {self.experts_per_token}; it must be between 1 and num_experts, {self.num_experts}",
        )
        count = self.num_parameters
        _require(count <= MAX_PARAMETERS, f"the sizes make {count:,} parameters; at most {MAX_PARAMETERS:,} are served")

    @property
    def num_parameters(self) -> int:
        return self._parameters_with(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token's forward pass multiplies with or looks up in, all norms included."""
        return self._parameters_with(self.experts_per_token)

    def _parameters_with(self, experts: int) -> int:
        d, dh = self.hidden_size, self.head_dim
        attention = d * dh * (2 * self.num_heads + 2 * self.num_kv_heads) + 2 * dh
        moe = self.num_experts * d + experts * 3 * d * self.expert_size
        return self.num_layers * (attention + moe + 2 * d) + 2 * self.vocab_size * d + d

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` with which ``AutoModelForCausalLM`` computes the same function."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.expert_size,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "sliding_window": self.context_length,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            **_FIXED,
        }

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a ``config.json``. Raises UnsupportedConfig when it asks for anything but what we compute."""
        for key, wanted in _FIXED.items():
            if raw.get(key) != wanted:
                raise UnsupportedConfig(f"{key} is {raw.get(key)!r}; only {wanted!r} is implemented")
        for key in _FOREIGN & raw.keys():
            raise UnsupportedConfig(f"{key} is not implemented")
        missing = [key for key in _TRANSLATED if key not in raw]
        _require(not missing, f"{missing[:1]} is missing")
        return cls(**{ours: raw[theirs] for theirs, ours in _TRANSLATED.items()})


# Qwen3-MoE with these values is the one function the model computes; anything else is refused, not misread.
_FIXED: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rope_scaling": None,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}

# Other ways to say how positions, layers or numbers are to be read; our files never hold them.
_FOREIGN = {"rope_parameters", "layer_types", "quantization_config"}

_TRANSLATED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_size",
    "sliding_window": "context_length",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedConfig(message)
