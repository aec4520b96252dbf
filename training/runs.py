"""The folder of a run: ``runs/<run>/step-<n>/`` are checkpoints that also hold what a resume needs. Knows no maths.

A kill at any moment leaves the folders before it whole: each is written beside its place and renamed into it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from model import checkpoint
from training import Refused

KEPT = 2
RESUME = "resume.safetensors"
"""float32 weights and the optimizer's state; the rounded weights beside it could not continue a run bit by bit."""

REPORT = "report.json"
"""What a report found; it names the fingerprint of the folder that it lies in."""

_NAME = re.compile(r"step-(0|[1-9]\d*)", re.ASCII)
_HALF_WRITTEN = re.compile(r"\.step-\d+\..+")


class NothingToResume(Refused):
    """A run has no checkpoint that verifies. One sentence."""


class NotWritable(Refused):
    """A run's folder cannot be made or written to. One sentence."""


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step}"


def save_step(run: Path, step: int, serving: dict[str, bytes], card: str, state: dict[str, Tensor], best: int) -> Path:
    """Save a step as a new folder and drop all but the newest two and the step that is best so far."""
    folder = step_folder(run, step)
    if folder.exists():  # an interrupted run that was resumed from further back comes by here again
        _remove(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    checkpoint.save(folder, {**serving, RESUME: to_bytes(tensors)}, unlisted={"README.md": card.encode()})
    kept = {folder, step_folder(run, best), *_whole(run)[:KEPT]}
    # Left by a kill; nobody else writes to this run.
    half_written = {path for path in run.glob(".step-*") if _HALF_WRITTEN.fullmatch(path.name) and path.is_dir()}
    for old in {*steps(run), *half_written} - kept:
        _remove(old)
    return folder


def _remove(folder: Path) -> None:
    """Of a link, the link alone: what it leads to was put elsewhere by somebody who wants it."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def steps(run: Path) -> list[Path]:
    """All step folders, the newest first."""
    folders = [folder for folder in run.glob("step-*") if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def newest(run: Path) -> Path:
    """The newest folder of a run whose manifest verifies. Raises NothingToResume."""
    whole = _whole(run)
    if not whole and steps(run):
        raise NothingToResume(f"{run} has no whole checkpoint; delete its step folders, or name another run with --run")
    if not whole:
        raise NothingToResume(f"{run} has no whole checkpoint; start the run without --resume")
    return whole[0]


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


def forget_metrics_after(run: Path, step: int) -> None:
    """Drop the lines of steps that a run is going to take once more."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    kept = "".join(json.dumps(values) + "\n" for values in read_metrics(run) if values["step"] <= step)
    beside = path.with_name("metrics.jsonl.new")  # so that a kill leaves the old file or the new one
    beside.write_text(kept)
    beside.replace(path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` that tell of a step: a kill may cut one off, and a power cut leave zeros in its
    place. Raises OSError."""
    return [values for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if (values := _metrics_of(line))]


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:  # neither JSON nor UTF-8
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def claim(run: Path, seen: list[Path]) -> TextIO:
    """Keep a run to this process until what is returned is closed, or the process ends.

    ``seen`` are the steps on which it was decided how to begin. Raises NotWritable if another process trains the run
    or has done so since.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotWritable(f"{run} is being trained by another process; name another run with --run") from None
    if steps(run) != seen:
        lock.close()
        raise NotWritable(f"{run} was trained by another process meanwhile; start again to see what there is now")
    return lock


def require_writable(run: Path) -> None:
    """Raises NotWritable. Makes nothing: a run that is refused later leaves no folder behind."""
    existing = next(path for path in (run, *run.absolute().parents) if path.is_symlink() or path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise NotWritable(f"{run} cannot be written: {existing} is no folder that this user may write to")
    for path in run.glob("step-*"):
        if _NAME.fullmatch(path.name) and not path.is_dir():
            raise NotWritable(f"{path} is no folder, and a step may need its place; move it, or name another run")


def export(source: Path, target: Path) -> None:
    """Copy what serving reads, and the model card and the report with its pictures, into a new folder.

    Raises CheckpointError, and FileExistsError when the folder exists.
    """
    manifest = checkpoint.load(source).manifest  # whole is not enough: what cannot be loaded is not worth copying
    served = {name: (source / name).read_bytes() for name in manifest.files if name != RESUME}
    beside = [source / "README.md", source / REPORT, *source.glob("*.png"), *source.glob("*.gif")]
    unlisted = {path.name: path.read_bytes() for path in beside if path.is_file()}
    if REPORT in unlisted:
        here, there = manifest.fingerprint, checkpoint.fingerprint(served)
        unlisted[REPORT] = unlisted[REPORT].replace(here.encode(), there.encode(), 1)
    checkpoint.save(target, served, unlisted)


def _whole(run: Path) -> list[Path]:
    return [folder for folder in steps(run) if is_whole(folder)]


def is_whole(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
    except checkpoint.CheckpointError:
        return False
    return True
