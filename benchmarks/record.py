"""What all benchmarks share: failing in one line, what a record says of its circumstances, and where it is kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from model import checkpoint
from model.checkpoint import CheckpointError
from model.machine import usable_cpus
from service.engine.native.library import NoLibrary
from training import Refused

RESULTS = Path(__file__).parent / "results"
MOST_CORES_OF_OTHERS = 0.1
"""More than this, and what was measured is the neighbours' as well."""

Result = dict[str, Any]
Clocks = tuple[float, float, float]
"""Seconds: of the wall, of all processes on all cores, of this process and those it has waited for."""
T = TypeVar("T")


class Trouble(Exception):
    """Something could not be measured. One line."""


TROUBLES = (Trouble, CheckpointError, Refused, NoLibrary, OSError, EOFError)
"""What ends a benchmark, or one contestant of a race, in one line. EOFError: the engine's process has ended."""


def command_line(module: str, description: str, *, of_checkpoint: bool = True) -> argparse.ArgumentParser:
    """What every benchmark that keeps a record can be told; each adds its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    if of_checkpoint:
        parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=usable_cpus(), metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


def refusing(what: str, action: Callable[[], T]) -> T | None:
    """What the action returns; None where there was trouble, which has then been told in one line.

    SIGTERM and SIGHUP are exceptions meanwhile and afterwards: whatever the action has started ends with them.
    """
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        return action()
    except TROUBLES as error:
        print(f"benchmarks, {what}: {in_one_line(error)}", file=sys.stderr)
        return None


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def take(
    what: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Result],
    table: Callable[[Result], str],
) -> Result | None:
    """Measure, show the table and keep the record in --results; None where that could not be, which has been told.

    A record has what was asked, of which checkpoint, at which commit and where, and what was measured. That may name
    "cores_of_others" where the clocks of waited-for processes would mislead, and whatever else is better known there.
    """
    result = refusing(what, lambda: _measured(arguments, measure))
    if result is None:
        return None
    print(table(result))
    if (others := result["machine"]["cores_of_others"] or 0) > MOST_CORES_OF_OTHERS:
        print(f"Do not trust this: other programs kept {others:.1f} cores busy meanwhile.")
    keep(arguments.results, what, result)
    return result


def _measured(arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], Result]) -> Result:
    asked = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    weights = {}
    if hasattr(arguments, "checkpoint"):
        manifest = checkpoint.verify(arguments.checkpoint)
        weights = {"checkpoint": str(arguments.checkpoint), "manifest": manifest.fingerprint}
    start = clocks()
    measured = measure(arguments)
    others = measured.pop("cores_of_others") if "cores_of_others" in measured else cores_of_others(start)
    circumstances = {"commit": commit(), "machine": {**machine(), "cores_of_others": others}}
    return {
        **circumstances,
        "python": platform.python_version(),
        "torch": version("torch"),
        **asked,
        **weights,
        **measured,
    }


def keep(folder: Path, what: str, result: Result) -> None:
    """Print a result as one JSON line, with the date, and keep it in the folder under this moment (UTC)."""
    now = datetime.now(UTC)
    line = json.dumps({"date": now.isoformat(timespec="seconds"), **result})
    print(line)
    write(folder / f"{what}-{now:%Y-%m-%dT%H%M%S}.json", line + "\n")


def write(path: Path, text: str) -> None:
    """The whole file or none: whoever reads records never sees a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def kept(what: str, folder: Path = RESULTS) -> list[Path]:
    """The records of this kind, the newest first."""
    return sorted(folder.glob(f"{what}-*.json"), reverse=True)


def newest(what: str, folder: Path = RESULTS) -> Path:
    """Raises Trouble when there is none."""
    for path in kept(what, folder):
        return path
    raise Trouble(f"there is no {what}-*.json in {folder}")


def commit() -> str | None:
    """What git calls the sources, "-dirty" where a tracked file is another; None outside of a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine() -> Result:
    models = [line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"cpu": models[0] if models else os.uname().machine, "cores": usable_cpus()}


def cores_of_others(since: Clocks) -> float:
    """How many cores were busy, on average, with what is not ours. Ours have ended and been waited for."""
    wall, busy, own = (now - then for now, then in zip(clocks(), since, strict=True))
    return round(max(0.0, busy - own) / wall, 2)


def clocks() -> Clocks:
    busy = [int(jiffies) for jiffies in (_lines("/proc/stat") or ["cpu 0 0 0"])[0].split()[1:4]]
    return time.perf_counter(), sum(busy) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
