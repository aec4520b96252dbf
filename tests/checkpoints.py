"""Small checkpoints for tests: random weights of a fixed seed in every shape, written by the real code."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import verify
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training import record
from training.initialise import initialise, is_zero_at_first

# The 65 characters of tiny Shakespeare.
CHARACTERS = "\n !$&',-.3:;?" + string.ascii_letters

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 32,
    "context_length": 32,
}


def tiny_model(seed: int = 0, **overrides: Any) -> Transformer:
    """A model in which every part matters: nothing is zero, and no expert is idle."""
    model = Transformer(ModelConfig(**{**TINY, "vocab_size": len(CHARACTERS), **overrides}))
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_zero_at_first(name):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def tiny_files(model: Transformer, tokenizer: Tokenizer | None = None) -> dict[str, bytes]:
    """The files of a checkpoint of a model, as training writes them; its tokens are CHARACTERS unless told."""
    facts = {
        "config": {},
        "corpus": {"name": "none", "sha256": {}},
        "steps": 0,
        "tokens": 0,
        "seconds": 0.0,
        "loss_curve": [],
        "milestones": {},
        "validation_loss": None,
        "validation_windows": 0,
        "routing_baseline": [[1 / model.config.num_experts] * model.config.num_experts] * model.config.num_layers,
        "max_load": 1.0,
    }
    return record.serving_files(record.as_served(model), tokenizer or Tokenizer.of_characters(CHARACTERS), facts)


def plain_files() -> dict[str, bytes]:
    """The files of the tiny model without overrides, made once: to draw what the record tells takes half a second."""
    return dict(_plain_files())


@cache
def _plain_files() -> dict[str, bytes]:
    return tiny_files(tiny_model())


def as_trained(files: dict[str, bytes], **told: Any) -> dict[str, bytes]:
    """The same files with a record as of a training of two steps, but for what is told."""
    facts = {
        "config": {"steps": 2, "batch_size": 8, "seed": 1, "tokenizer": "character"},
        "corpus": {"name": "verse", "sha256": {"train": "1", "validation": "1"}},
        "steps": 2,
        "loss_curve": [{"step": 2, "train_loss": 4.1, "validation_loss": 4.2}],
        "validation_loss": 4.2,
        "bits_per_character": 6.1,
        "bigram_loss": 2.5,
    }
    record = {**json.loads(files[checkpoint.RECORD]), **facts, **told}
    return {**files, checkpoint.RECORD: json.dumps(record).encode()}


def tiny_checkpoint(folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None, **overrides: Any) -> Path:
    """Write a small checkpoint to a new folder."""
    if tokenizer:
        overrides["vocab_size"] = tokenizer.vocab_size
    is_plain = not (seed or tokenizer or overrides)
    checkpoint.save(folder, plain_files() if is_plain else tiny_files(tiny_model(seed, **overrides), tokenizer))
    return folder


def tiny_report(folder: Path, **fields: Any) -> dict[str, Any]:
    """What `report.json` might say of the tiny checkpoint in a folder: every expert likes another pair of letters, the
    last layer's first expert is the dearest, and half of the costs may be chance."""
    layers, experts = range(TINY["num_layers"]), range(TINY["num_experts"])
    letters = [
        [
            [{"token": token, "lift": 3.5, "taken": 1.0} for token in (CHARACTERS[4 * layer + expert], " ")]
            for expert in experts
        ]
        for layer in layers
    ]
    costs = [[0.01 * (1 + layer) - 0.003 * expert for expert in experts] for layer in layers]
    errors = [[(0.1 if layer + expert & 1 else 0.7) * costs[layer][expert] for expert in experts] for layer in layers]
    return {
        "fingerprint": verify(folder).fingerprint,
        "favourites": letters,
        "causal_map": {"windows": 2, "baseline": 4.1, "cost": costs, "standard_error": errors},
        "samples": ["what else the report may tell"],
        **fields,
    }


def reported_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint with a report beside it."""
    tiny_checkpoint(folder)
    (folder / "report.json").write_text(json.dumps(tiny_report(folder)))
    return folder
