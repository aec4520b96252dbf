"""``python -m benchmarks.counting``: what share of a decode step goes into counting which experts worked.

Counting is timed inside the very step that it is a share of, so a machine that slows down slows both, and every number
of streams takes its turn in every round. Prints a line for each for people and one JSON line for machines, which is
also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, clocks, cores_of_others, keep, machine
from model import checkpoint
from model.checkpoint import Checkpoint
from model.experts import ROW_MULTIPLE
from model.machine import usable_cpus
from model.router import Routing
from service.engine.counters import ExpertCounters
from service.engine.engine import Engine
from service.engine.runner import TorchRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import Phase, SamplingParams
from service.engine.sequence import Sequence as EngineSequence

MOST_OF_A_STEP = 0.02
"""What counting may cost."""


class TimedCounters(ExpertCounters):
    """Counts as ever, and knows how long it has taken."""

    seconds = 0.0

    def add(self, phase: Phase, slots: Tensor, routings: Sequence[Routing]) -> None:
        _settle(slots.device)  # what was computed before is none of the counting's time
        started = time.perf_counter()
        super().add(phase, slots, routings)
        _settle(slots.device)
        self.seconds += time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Subject:
    """An engine with so many streams that go on for as long as anybody steps."""

    def __init__(self, loaded: Checkpoint, streams: int, steps: int) -> None:
        self._counters = TimedCounters(loaded.config, streams, loaded.model.device)
        runner = TorchRunner(loaded.model, streams, self._counters)
        runner.pad_rows_to(ROW_MULTIPLE)
        self._engine = Engine(runner, Scheduler(streams, 128), self._counters)
        self._streams = streams
        prompt = tuple(loaded.tokenizer.encode("ROMEO:"))
        for seed in range(streams):
            self._engine.add(EngineSequence(prompt, SamplingParams(max_new_tokens=steps, seed=seed)))

    def shares(self, steps: int) -> list[float]:
        """Of each of so many steps that decode every stream."""
        shares: list[float] = []
        while len(shares) < steps:
            before = self._counters.seconds
            report = self._engine.step()
            if report.phase is Phase.DECODE and report.batch_size == self._streams:
                shares.append((self._counters.seconds - before) / report.seconds)
        return shares


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counting", description="The cost of counting experts.")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"), metavar="FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=usable_cpus(), metavar="N")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of each number of streams in a round")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(arguments)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over all steps, after one round to warm up."""
    torch.set_num_threads(arguments.threads)
    loaded = checkpoint.load(arguments.checkpoint, arguments.device)
    # A few more than are looked at: while the last prompts are read, the first streams draw already.
    tokens = (arguments.rounds + 1) * arguments.steps + 2 * max(arguments.streams) + 2
    subjects = {streams: Subject(loaded, streams, tokens) for streams in arguments.streams}
    shares: dict[int, list[float]] = {streams: [] for streams in subjects}
    for turn in range(arguments.rounds + 1):
        for streams, subject in subjects.items():
            of_round = subject.shares(arguments.steps)
            if turn > 0:
                shares[streams] += of_round
    return [{"streams": streams, "share": round(statistics.median(each), 5)} for streams, each in shares.items()]


def main() -> int:
    arguments, started = parse(), clocks()
    told = measure(arguments)
    result = {
        "machine": {**machine(), "cores_of_others": cores_of_others(started)},
        "checkpoint": str(arguments.checkpoint),
        "device": arguments.device,
        "threads": arguments.threads,
        "at_most": MOST_OF_A_STEP,
        "figures": told,
    }
    for row in told:
        print(f"{row['streams']:4d} streams: counting is {row['share']:.2%} of a decode step")
    keep(arguments.results, "counting", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
