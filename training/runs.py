"""The folder of a run: ``runs/<run>/step-<n>/`` are checkpoints that also hold what a resume needs. Knows no maths.

A kill at any moment leaves the folders before it whole: each is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from model import checkpoint

KEPT = 2
RESUME = "resume.safetensors"
"""float32 weights and the optimizer's state; the rounded weights beside it could not continue a run bit by bit."""

_NAME = re.compile(r"step-(\d+)")


class NothingToResume(Exception):
    """A run has no checkpoint that verifies. One sentence."""


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step}"


def save_step(run: Path, step: int, serving: dict[str, bytes], card: str, state: dict[str, Tensor]) -> Path:
    """Save a step as a new folder and drop all but the newest two."""
    folder = step_folder(run, step)
    if folder.exists():  # an interrupted run that was resumed from further back comes by here again
        shutil.rmtree(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    checkpoint.save(folder, {**serving, RESUME: to_bytes(tensors)}, unlisted={"README.md": card.encode()})
    half_written = run.glob(".step-*")  # left by a kill; nobody else writes to this run
    for old in [*sorted(_steps(run), key=step_of, reverse=True)[KEPT:], *half_written]:
        shutil.rmtree(old)
    return folder


def newest(run: Path) -> Path:
    """The newest folder of a run whose manifest verifies. Raises NothingToResume."""
    for folder in sorted(_steps(run), key=step_of, reverse=True):
        try:
            checkpoint.verify(folder)
        except checkpoint.CheckpointError:
            continue
        return folder
    raise NothingToResume(f"{run} has no whole checkpoint; start the run without --resume")


def read_state(folder: Path) -> dict[str, Tensor]:
    return from_bytes((folder / RESUME).read_bytes())


def step_of(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    assert found
    return int(found[1])


def append_metrics(run: Path, **values: Any) -> None:
    """One line of ``metrics.jsonl``."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def export(source: Path, target: Path) -> None:
    """Copy what serving reads, and the model card, into a new checkpoint folder. Raises CheckpointError."""
    manifest = checkpoint.verify(source)
    served = {name: (source / name).read_bytes() for name in manifest.files if name != RESUME}
    card = source / "README.md"
    checkpoint.save(target, served, unlisted={"README.md": card.read_bytes()} if card.exists() else {})


def _steps(run: Path) -> Iterator[Path]:
    return (folder for folder in run.glob("step-*") if _NAME.fullmatch(folder.name))
