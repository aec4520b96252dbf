"""What a run is told: a TOML preset, then flags. Bad values are refused before any work starts."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from model.config import CHOICES as SHAPE_CHOICES
from model.config import MAX_SIZE, ModelConfig, UnsupportedConfig
from training import Refused
from training.corpora import NAMES

PRESETS = Path(__file__).parent / "presets"
CHOICES: dict[str, tuple[str, ...]] = {
    "corpus": NAMES,
    "tokenizer": ("character", "byte", "bpe"),
    "router_noise": ("none", "gaussian", "jitter"),
    "init": ("zero_output", "kaiming", "xavier", "truncated_normal"),
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
HELP = {
    "corpus": "the text to train on",
    "items": "every line of --data is an item of its own, such as a name",
    "tokenizer": "what a token is",
    "bpe_vocab_size": "tokens of a tokenizer of the kind bpe: the 256 bytes and their pairs",
    "steps": "updates of the weights",
    "batch_size": "sequences of context_length tokens in a step, over all ranks",
    "seed": "fixes the first weights, the batches and all chance",
    "matrix_learning_rate": "peak of Muon's, for the matrices inside the layers",
    "embedding_learning_rate": "peak of AdamW's, for embedding and norms",
    "head_learning_rate": "peak of AdamW's, for head and routers",
    "weight_decay": "of the matrices, decoupled",
    "clip_norm": "largest norm of all gradients together; 0 leaves them as they are",
    "warmup_steps": "steps over which the rates rise",
    "warmdown_share": "share of the steps, at the end, over which the rates fall to zero",
    "balance_weight": "of the switch loss, summed over the layers",
    "z_weight": "of the router's z-loss",
    "importance_weight": "of Shazeer's importance loss",
    "load_weight": "of Shazeer's load loss; needs router_noise gaussian",
    "router_noise": "gaussian: Shazeer's noisy gating; jitter: Switch's",
    "jitter": "width of the router noise of that name",
    "dropout": "of what attention and the experts add, while training",
    "expert_dropout": "inside the experts, while training",
    "capacity_factor": "times an even share is what an expert takes of a sequence while training; 0 sets no limit",
    "init": "how the first weights are drawn",
    "evaluate_every": "steps from one look at the validation text, and one checkpoint, to the next",
    "hidden_size": "channels of the model",
    "num_layers": "layers, each of attention and experts",
    "num_heads": "query heads",
    "num_kv_heads": "heads for keys and values, which query heads share",
    "head_dim": "channels of a head",
    "num_experts": "experts in every layer; 1 is a dense model",
    "experts_per_token": "experts at work for a token; 1 with gates_over all is Switch",
    "expert_size": "width of an expert",
    "context_length": "positions that attention sees, and tokens of a training sequence",
    "rope_theta": "base of the rotary positions",
    "rms_norm_eps": "added to a mean square before its root",
    "activation": "swiglu has three matrices an expert, the others two",
    "num_groups": "groups of experts; more than 1 is two levels of gating",
    "groups_per_token": "groups at work for a token",
    "gates_over": "the softmax is over the chosen experts, or over all as in Switch",
}
"""What a flag's value does; ``--help`` shows it."""
MOST_DROPOUT = 1 - 2.0**-16
"""A rate is rounded to a multiple of 2^-16 where it is drawn; one above this would be 1."""
SHAPE_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name != "vocab_size")


class BadConfig(Refused):
    """A preset or a flag asks for something that cannot be. One sentence."""


@dataclass(frozen=True)
class TrainingConfig:
    """One run; HELP says what each value does. ``shape`` holds ModelConfig's fields but for the vocabulary."""

    corpus: str = "shakespeare"
    items: bool = False
    tokenizer: str = "character"
    bpe_vocab_size: int = 512
    steps: int = 1000
    batch_size: int = 24
    seed: int = 1
    matrix_learning_rate: float = 0.02
    embedding_learning_rate: float = 0.008
    head_learning_rate: float = 0.004
    weight_decay: float = 0.1
    clip_norm: float = 0.0
    warmup_steps: int = 30
    warmdown_share: float = 0.6
    balance_weight: float = 0.01
    z_weight: float = 0.001
    importance_weight: float = 0.0
    load_weight: float = 0.0
    router_noise: str = "none"
    jitter: float = 0.01
    dropout: float = 0.0
    expert_dropout: float = 0.0
    capacity_factor: float = 0.0
    init: str = "zero_output"
    evaluate_every: int = 100
    shape: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require_kinds()
        _require(type(self.shape) is dict, f"shape is {self.shape!r}; it must be a table")
        _require_known(self.shape, SHAPE_FIELDS, "a shape")
        for name in ("steps", "batch_size", "evaluate_every"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (f.name for f in fields(self) if isinstance(f.default, int | float)):
            value = getattr(self, name)  # written so that NaN is out of range as well
            _require(0 <= value < 2**63, f"{name} is {value}; it must be at least 0 and below 2^63")
        _require(0 <= self.warmdown_share <= 1, f"warmdown_share is {self.warmdown_share}; it must be between 0 and 1")
        _require(self.bpe_vocab_size >= 256, f"bpe_vocab_size is {self.bpe_vocab_size}; the bytes alone are 256")
        _require(
            self.bpe_vocab_size <= MAX_SIZE, f"bpe_vocab_size is {self.bpe_vocab_size}; it must be at most {MAX_SIZE:,}"
        )
        for name in ("dropout", "expert_dropout"):
            value = getattr(self, name)
            _require(value <= MOST_DROPOUT, f"{name} is {value}; it must be below 1, and at most {MOST_DROPOUT:.6f}")
        _require(self.jitter < 1, f"jitter is {self.jitter}; it must be below 1")
        _require(
            any((self.matrix_learning_rate, self.embedding_learning_rate, self.head_learning_rate)),
            "all learning rates are 0, so nothing would be learnt",
        )
        decay = self.matrix_learning_rate * self.weight_decay
        _require(
            decay < 1, f"matrix_learning_rate times weight_decay is {decay:g}; from 1 on a step turns weights round"
        )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        _require(
            not self.load_weight or self.router_noise == "gaussian",
            f"load_weight is {self.load_weight}; the load loss needs router_noise gaussian, not {self.router_noise}",
        )
        self._require_routers_that_learn(self.model_config(vocab_size=1))

    def _require_routers_that_learn(self, shape: ModelConfig) -> None:
        """The softmax over one that was chosen alone is 1 whatever the router says, so its gradient is zero."""
        in_group = shape.num_experts // shape.num_groups
        experts = f"experts_per_token is {shape.experts_per_token}"
        if shape.groups_per_token > 1:
            experts += f", one in each of {shape.groups_per_token} groups"
        groups = f"groups_per_token is {shape.groups_per_token}"
        for said, chosen, among in (
            (groups, shape.groups_per_token, shape.num_groups),
            (experts, shape.experts_per_group_and_token, in_group),
        ):
            _require(
                shape.gates_over == "all" or chosen > 1 or among == 1,
                f"{said}, so a router chooses one of {among}, and with gates_over chosen its gate is always 1: it "
                "would learn nothing from the text; set gates_over to all, as Switch does, or choose more",
            )

    def _require_kinds(self) -> None:
        for each in fields(self):
            if each.name == "shape":
                continue
            value, kind = getattr(self, each.name), type(each.default)
            # A preset may leave the fraction of a number out; true is no number.
            fits = type(value) is kind or (kind is float and type(value) is int)
            _require(fits, f"{each.name} is {value!r}; it must be {KINDS[kind]}")

    def model_config(self, vocab_size: int) -> ModelConfig:
        try:
            return ModelConfig(vocab_size=vocab_size, **self.shape)
        except UnsupportedConfig as error:
            raise BadConfig(str(error)) from None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def from_preset(name: str, overrides: dict[str, Any]) -> TrainingConfig:
    """A preset with some values replaced. Raises BadConfig."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        raise BadConfig(f"there is no preset {name!r}; choose one of {', '.join(preset_names())}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither TOML nor UTF-8
        raise BadConfig(f"{path} is no preset: {error}") from None
    return replaced(from_dict(values), overrides)


def from_dict(values: dict[str, Any]) -> TrainingConfig:
    _require_known(values, [f.name for f in fields(TrainingConfig)], "a preset")
    return TrainingConfig(**values)


def replaced(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    shape = {**config.shape, **{name: overrides[name] for name in SHAPE_FIELDS if name in overrides}}
    rest = {name: value for name, value in overrides.items() if name not in SHAPE_FIELDS}
    return replace(config, shape=shape, **rest)


def require_used(config: TrainingConfig, flags: dict[str, Any]) -> None:
    """Raises BadConfig for a flag without effect; a preset may hold such a value for whoever turns on what it is of."""
    for flag, name, needed in (("jitter", "router_noise", "jitter"), ("bpe_vocab_size", "tokenizer", "bpe")):
        if flag in flags and (chosen := getattr(config, name)) != needed:
            raise BadConfig(f"{flag} is {flags[flag]}, but {name} is {chosen}; make that {needed}, or leave {flag} out")
    if "warmup_steps" in flags and config.warmup_steps > config.steps:
        raise BadConfig(
            f"warmup_steps is {config.warmup_steps}, but steps is {config.steps}; the rates would never peak"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for every value of a run; a flag that is absent leaves the preset's value."""
    defaults = {
        **{f.name: f.default for f in fields(TrainingConfig)},
        **{f.name: f.default for f in fields(ModelConfig)},
    }
    group = parser.add_argument_group("in place of the preset's values")
    for name in [*(f.name for f in fields(TrainingConfig) if f.name != "shape"), *SHAPE_FIELDS]:
        flag = "--" + name.replace("_", "-")
        if isinstance(defaults[name], bool):  # bool("False") is true, so these take no word: --items, --no-items
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=HELP[name])
            continue
        # A wrong word is refused where a preset's is, in the same one line.
        kind = type(defaults[name])
        shown = "|".join({**CHOICES, **SHAPE_CHOICES}.get(name, ["N" if kind is int else "X"]))
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=shown, help=HELP[name])


def flag_values(arguments: argparse.Namespace) -> dict[str, Any]:
    known = {f.name for f in fields(TrainingConfig)} | set(SHAPE_FIELDS)
    return {name: value for name, value in vars(arguments).items() if name in known}


def _require_known(values: Iterable[str], known: Sequence[str], of: str) -> None:
    if unknown := [name for name in values if name not in known]:
        raise BadConfig(f"{of} has no {', '.join(unknown)}; train --help tells what there is")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BadConfig(message)
