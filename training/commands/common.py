"""What several commands ask for alike: a checkpoint, a device, a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training import config as configs

if TYPE_CHECKING:
    import torch

    from model.checkpoint import Checkpoint
    from training.corpora import Corpus


def corpus_of(data: Path | None, name: str, of_items: bool) -> Corpus:
    from training import corpora

    if not data:
        return corpora.load(name)
    return corpora.items_from_file(data) if of_items else corpora.from_file(data)


def trained_on_items(loaded: Checkpoint) -> bool:
    """Whether a file was split by items for it; split otherwise, what it trained on would be scored."""
    config = loaded.training.get("config")
    return isinstance(config, dict) and bool(config.get("items"))


def device_of(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise configs.BadConfig("--device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def require_one_text(corpus: str | None, data: Path | None) -> None:
    if corpus is not None and data is not None:
        raise configs.BadConfig("--corpus names one text and --data another; leave one of them out")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
