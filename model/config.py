"""The shape of a model, and its translation to and from a Hugging Face ``config.json``. Knows no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

MAX_POSITIONS = 65_536
MAX_SIZE = 2**24
MAX_PARAMETERS = 2**36


class UnsupportedConfig(ValueError):
    """A ``config.json`` asks for something this code does not compute."""


@dataclass(frozen=True)
class ModelConfig:
    """A sparse mixture-of-experts decoder; with its defaults exactly the family Hugging Face calls Qwen3-MoE.

    Every layer attends over the last ``context_length`` positions, itself included, and routes each token to
    ``experts_per_token`` of ``num_experts`` experts of width ``expert_size``. Three options leave that family:

    - ``activation``: "swiglu", or "relu" or "gelu" for plain experts of two matrices, down(act(up x))
    - ``num_groups`` above 1: two levels of gating (Shazeer et al. 2017, appendix B). Every group has as many experts; a
      token goes to ``groups_per_token`` groups and has an equal share of its experts in each
    - ``gates_over``: the softmax is over the "chosen" experts, or over "all", as in Switch; where one alone is chosen,
      on either level, only the latter lets the loss reach that level's router
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
    activation: str = "swiglu"
    num_groups: int = 1
    groups_per_token: int = 1
    gates_over: str = "chosen"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        for field in fields(self):
            if field.name in CHOICES:
                continue
            value = getattr(self, field.name)
            kind = float if field.name in ("rope_theta", "rms_norm_eps") else int
            fits = type(value) is kind or (kind is float and type(value) is int)
            _require(fits, f"{field.name} is {value!r}; it must be a {'whole ' if kind is int else ''}number")
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
        self._require_groups()
        count = self.num_parameters
        _require(count <= MAX_PARAMETERS, f"the sizes make {count:,} parameters; at most {MAX_PARAMETERS:,} are served")

    def _require_groups(self) -> None:
        groups, chosen = self.num_groups, self.groups_per_token
        _require(
            self.num_experts % groups == 0,
            f"num_experts is {self.num_experts}; it must be a multiple of num_groups, which is {groups}",
        )
        _require(
            self.experts_per_token % chosen == 0,
            f"experts_per_token is {self.experts_per_token}; it must be a multiple of groups_per_token, {chosen}",
        )
        _require(chosen <= groups, f"groups_per_token is {chosen}; it must be at most num_groups, {groups}")
        _require(
            self.experts_per_group_and_token <= self.num_experts // groups,
            f"experts_per_token is {self.experts_per_token}, {self.experts_per_group_and_token} in each chosen group; "
            f"a group has {self.num_experts // groups}",
        )

    @property
    def foreign_fields(self) -> list[str]:
        """The fields whose values Qwen3-MoE does not know; without any it computes the same function."""
        return [name for name, ordinary in _ORDINARY.items() if getattr(self, name) != ordinary]

    @property
    def experts_per_group_and_token(self) -> int:
        return self.experts_per_token // self.groups_per_token

    @property
    def matrices_per_expert(self) -> int:
        return 3 if self.activation == "swiglu" else 2

    def can_do_without(self, disabled: Collection[int]) -> bool:
        """Whether a layer can still give every token its experts when these are disabled.

        A group that cannot give a token its share is passed over as a whole, so enough groups must be left that can.
        """
        size = self.num_experts // self.num_groups
        gone = Counter(expert // size for expert in set(disabled))
        unable = sum(size - count < self.experts_per_group_and_token for count in gone.values())
        return self.num_groups - unable >= self.groups_per_token

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
        routers = self.num_experts + (self.num_groups if self.num_groups > 1 else 0)
        moe = routers * d + experts * self.matrices_per_expert * d * self.expert_size
        return self.num_layers * (attention + moe + 2 * d) + 2 * self.vocab_size * d + d

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` with which ``AutoModelForCausalLM`` computes the same function.

        Where no other tool does, the model has a type of our own, so that it is refused rather than misread.
        """
        return {**self._qwen3_moe(), **(self._moescope() if self.foreign_fields else {})}

    def _moescope(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _ORDINARY}
        return {
            "architectures": ["MoescopeForCausalLM"],
            "model_type": "moescope",
            "hidden_act": _HIDDEN_ACT[self.activation],
            "norm_topk_prob": self.gates_over == "chosen",
            **own,
        }

    def _qwen3_moe(self) -> dict[str, Any]:
        translated = {theirs: getattr(self, ours) for theirs, ours in _TRANSLATED.items()}
        dense = {"intermediate_size": self.expert_size}  # of layers without experts, which there are none of
        return {"architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16", **translated, **dense, **_FIXED}

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a ``config.json``. Raises UnsupportedConfig when it asks for anything but what we compute."""
        is_ours = raw.get("model_type") == "moescope"
        names = {**_TRANSLATED, **({name: name for name in _ORDINARY} if is_ours else {})}
        missing = [key for key in names if key not in raw]
        _require(not missing, f"it lacks {', '.join(missing)}")
        foreign = sorted((_FOREIGN | _ORDINARY.keys()) & raw.keys() - names.keys())
        _require(not foreign, f"it has {', '.join(foreign)}, which this program does not compute")
        config = cls(**{ours: raw[theirs] for theirs, ours in names.items()})
        fixed = {**_FIXED, **(config._moescope() if is_ours else {})}
        for key in _FIXED:
            _require(raw.get(key) == fixed[key], f"{key} is {raw.get(key)!r}; only {fixed[key]!r} is implemented")
        return config


CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ("swiglu", "relu", "gelu"),
    "gates_over": ("chosen", "all"),
}
"""The values of the fields that are words."""

# What Qwen3-MoE does, of the fields that it lacks.
_ORDINARY: dict[str, Any] = {"activation": "swiglu", "num_groups": 1, "groups_per_token": 1, "gates_over": "chosen"}
_HIDDEN_ACT = {"swiglu": "silu", "relu": "relu", "gelu": "gelu"}

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
