"""``python -m benchmarks.quality``: what recipes reach at one budget, over seeds. Every run's record is kept.

A row is a preset and flags. A run that was interrupted goes on, and one that has its record is not run again. The table
in docs/training.md is made from the records alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, commit, machine, write
from model.machine import usable_cpus
from training.config import BadConfig, from_preset

RECORDS = RESULTS / "quality"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- quality: python -m benchmarks.quality --table -->", "<!-- end -->"
MAKEMOE = "1.7439"  # the milestone of a run's record that is the notebook's best
BUDGET = ("--steps", 1500)  # of 6,144 characters: about half an hour of one core
TWICE_OVER = (*BUDGET, "--dropout", 0.05, "--expert-dropout", 0.1)  # the text, whatever the preset becomes


@dataclass(frozen=True)
class Row:
    """What is trained: a preset, and flags that replace its values. ``says`` is for the table."""

    says: str
    preset: str
    flags: tuple[object, ...] = BUDGET


ROWS = {
    "strict": Row("`strict`: tiny Shakespeare alone", "strict"),
    "extended": Row("`shakespeare`", "shakespeare", TWICE_OVER),
    "dense": Row("`dense`, its control", "dense", TWICE_OVER),
    "noisy": Row(
        "noisy top-2, importance and load loss (Shazeer et al. 2017)",
        "shakespeare",
        (
            *TWICE_OVER,
            *("--router-noise", "gaussian", "--importance-weight", 0.1, "--load-weight", 0.1, "--balance-weight", 0),
        ),
    ),
    "top-1": Row(
        "top-1 of 4, gates over all, capacity 1.25 (Switch)",
        "shakespeare",
        (
            *TWICE_OVER,
            *("--num-experts", 4, "--experts-per-token", 1, "--expert-size", 512, "--gates-over", "all"),
            *("--capacity-factor", 1.25, "--router-noise", "jitter"),
        ),
    ),
    "two-levels": Row(
        "2 of 4 groups, 2 of 4 experts in each",
        "shakespeare",
        (
            *TWICE_OVER,
            *("--num-experts", 16, "--experts-per-token", 4, "--expert-size", 128),
            *("--num-groups", 4, "--groups-per-token", 2),
        ),
    ),
    "fine": Row(
        "top-4 of 16, one level",
        "shakespeare",
        (*TWICE_OVER, "--num-experts", 16, "--experts-per-token", 4, "--expert-size", 128),
    ),
    "unbalanced": Row("`shakespeare` without its balance loss", "shakespeare", (*TWICE_OVER, "--balance-weight", 0)),
    "makemoe": Row("`makemoe`, the notebook's budget", "makemoe", ()),
    "characters": Row("`quick`", "quick", ()),
    "bytes": Row("`quick`, bytes", "quick", ("--tokenizer", "byte")),
    "bpe": Row("`quick`, byte-level BPE of 512 tokens", "quick", ("--tokenizer", "bpe")),
}


def run(name: str, seed: int, threads: int) -> Path | None:
    """Train one row with one seed to its end; the file of its record, or None if it failed or was stopped."""
    label = f"quality-{name}-{seed}"
    folder = Path("runs") / label
    if (trained := _finished(folder, ROWS[name], seed)) is None:
        _train(folder, ROWS[name], seed, threads)
        trained = _finished(folder, ROWS[name], seed)
    if trained is None:
        print(f"{label} has not come to its end; runs/{label}.log says why", file=sys.stderr, flush=True)
        return None
    return keep(name, seed, threads, trained)


def _train(folder: Path, row: Row, seed: int, threads: int) -> None:
    """Begin, or go on. A run that is interrupted ends in order too, so its exit status says nothing."""
    resume = ["--resume"] if any(folder.glob("step-*")) else []
    flags = [*row.flags, "--seed", seed, "--run", folder.name, *resume]
    command = [sys.executable, "-m", "training", "train", "--preset", row.preset, *map(str, flags)]
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)


def recipe(row: Row, seed: int) -> dict[str, Any]:
    """Every setting of a run, as its preset is today."""
    names = [str(flag).removeprefix("--").replace("-", "_") for flag in row.flags[::2]]
    return from_preset(row.preset, {**dict(zip(names, row.flags[1::2], strict=True)), "seed": seed}).as_dict()


def _finished(folder: Path, row: Row, seed: int) -> dict[str, Any] | None:
    """The record of a run that has taken all steps of its row, if it was one by the row's recipe."""
    try:
        wanted = recipe(row, seed)
    except BadConfig:  # which training will say
        return None
    last = folder / f"step-{wanted['steps']}" / "training.json"
    training = json.loads(last.read_text()) if last.exists() else None
    return training if training and training["config"] == wanted else None


def record_of(name: str, seed: int) -> Path:
    return RECORDS / f"{name}-{seed}.json"


def keep(name: str, seed: int, threads: int, training: dict[str, Any]) -> Path:
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    about = {"row": name, "seed": seed, "date": date, "commit": commit(), "machine": machine()}
    training.pop("known_answer", None)
    path = record_of(name, seed)
    write(path, json.dumps({**about, "threads": threads, "training": training}) + "\n")
    print(f"{path}: {training['validation_loss']:.4f}", flush=True)
    return path


def records() -> list[dict[str, Any]]:
    """In the order of ROWS, seeds ascending."""
    found = [json.loads(path.read_text()) for path in RECORDS.glob("*.json")]
    return sorted(found, key=lambda each: (list(ROWS).index(each["row"]), each["seed"]))


def table(kept: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each row, losses of its seeds in order."""
    if not kept:
        return "No run has been made yet."
    lines = [
        "| recipe | seeds | tokens | core minutes | operations | loss of each, nats per token | mean | "
        "bits per character | core minutes and operations to 1.7439 | busiest expert, times the mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(ROWS[name].says, list(runs)) for name, runs in groupby(kept, key=lambda each: each["row"])]
    return "\n".join(lines)


def _line(says: str, runs: Sequence[dict[str, Any]]) -> str:
    trained = [each["training"] for each in runs]
    losses = [each["validation_loss"] for each in trained]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    minutes = min(_core_minutes(each, each["training"]["seconds"]) for each in runs)  # the least disturbed
    cells = [
        says,
        str(len(runs)),
        f"{trained[0]['tokens'] / 1e6:.1f} M",
        f"{minutes:.0f}",
        f"{trained[0]['flops']:.1e}",
        ", ".join(map(_losses, trained)),
        f"**{statistics.mean(losses):.4f}**{spread}",
        f"{statistics.mean(each['bits_per_character'] for each in trained):.4f}",
        _way_to_makemoe(runs),
        f"{max(each['max_load'] for each in trained):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _losses(training: dict[str, Any]) -> str:
    """That of the last step, and the best where another step had it."""
    final, best = (f"{each['validation_loss']:.4f}" for each in (training, training["best"]))
    return final if best == final else f"{final} (best {best})"


def _core_minutes(each: dict[str, Any], seconds: float) -> float:
    return float(each["threads"] * seconds / 60)


def _way_to_makemoe(runs: Sequence[dict[str, Any]]) -> str:
    """A run notes it at the first look after it, so this is an upper bound."""
    reached = [(each, each["training"]["milestones"].get(MAKEMOE)) for each in runs]
    if not all(milestone for _, milestone in reached):
        return "–"
    minutes = min(_core_minutes(each, milestone["seconds"]) for each, milestone in reached)
    return f"{minutes:.1f}, {statistics.mean(milestone['flops'] for _, milestone in reached):.1e}"


def with_table(page: str) -> str:
    """The page with the table of all records between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(records())}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="runs at the same time, which share the cores")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table anew")
    given = parser.parse_args(arguments)
    threads = max(1, usable_cpus() // given.jobs)
    pairs = [] if given.table else [(row, seed) for seed in given.seeds for row in given.rows]
    due = [pair for pair in pairs if not record_of(*pair).exists()]
    with ThreadPoolExecutor(given.jobs) as pool:
        kept = list(pool.map(lambda pair: run(pair[0], pair[1], threads), due))
    write(PAGE, with_table(PAGE.read_text()))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
