"""``python -m benchmarks.counting``: what share of a decode step goes into counting which experts worked.

Of both runners: the native step, which serves on a CPU and takes the time of its parts itself, and torch. Counting is
timed inside the very step that it is a share of, so a machine that slows down slows both, and every number of streams
takes its turn in every round. Prints a line for each for people and one JSON line for machines, which is also kept in
benchmarks/results/. Fails where counting costs more than it may.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import native
from benchmarks.record import Result, command_line, take
from model import checkpoint
from model.checkpoint import Checkpoint
from model.experts import ROW_MULTIPLE
from model.router import Routing
from service.engine.counters import ExpertCounters
from service.engine.engine import Engine
from service.engine.native.library import NoLibrary
from service.engine.native.runner import PARTS, why_not
from service.engine.runner import TorchRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import Phase, SamplingParams
from service.engine.sequence import Sequence as EngineSequence

MOST_OF_A_STEP = 0.02
POSITION = 139  # the middle of a text of the race
COUNTING = PARTS.index("counting")


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


class TorchSubject:
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


class NativeSubject:
    """The native runner with so many rows, which writes down what each of its parts took."""

    def __init__(self, loaded: Checkpoint, streams: int, threads: int) -> None:
        """Raises NoLibrary."""
        self._subject = native.Subject(loaded.model, streams, threads, POSITION)
        self._streams, self._threads = streams, threads

    def shares(self, steps: int) -> list[float]:
        """Of each of so many bursts of the same step."""
        bursts = (self._subject.step(self._streams, self._threads)[1] for _ in range(steps))
        return [float(parts[COUNTING] / parts.sum()) for parts in bursts]


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.counting", "The cost of counting experts.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of each number of streams in a round")
    parser.add_argument("--at-most", type=float, default=MOST_OF_A_STEP, metavar="SHARE", help="of a step")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> Result:
    """Medians over all steps, after one round to warm up."""
    torch.set_num_threads(arguments.threads)
    loaded = checkpoint.load(arguments.checkpoint, arguments.device)
    # A few more than are looked at: while the last prompts are read, the first streams draw already.
    tokens = (arguments.rounds + 1) * arguments.steps + 2 * max(arguments.streams) + 2
    subjects: dict[tuple[str, int], TorchSubject | NativeSubject] = {}
    reason = why_not(loaded.config) if arguments.device == "cpu" else "it computes on CPUs"
    if reason is None:
        try:
            subjects |= {("native", n): NativeSubject(loaded, n, arguments.threads) for n in arguments.streams}
        except NoLibrary as missing:
            reason = str(missing)
    subjects |= {("torch", streams): TorchSubject(loaded, streams, tokens) for streams in arguments.streams}
    shares: dict[tuple[str, int], list[float]] = {key: [] for key in subjects}
    for turn in range(arguments.rounds + 1):
        for key, subject in subjects.items():
            of_round = subject.shares(arguments.steps)
            if turn > 0:
                shares[key] += of_round
    figures = [
        {"runner": runner, "streams": streams, "share": round(statistics.median(each), 5)}
        for (runner, streams), each in shares.items()
    ]
    return {"no_native": reason, "figures": figures}


def table(result: Result) -> str:
    told = "{runner:6} {streams:4d} streams: counting is {share:.2%} of a decode step"
    lines = [told.format_map(row) for row in result["figures"]]
    return "\n".join([*lines, *([f"no native step: {reason}"] if (reason := result["no_native"]) else [])])


def main() -> int:
    result = take("counting", parse(), measure, table)
    if result is None:
        return 1
    over = [row for row in result["figures"] if row["share"] > result["at_most"]]
    for row in over:
        told = "benchmarks, counting: {share:.2%} of a step at {streams} streams by {runner} is more than it may cost"
        print(told.format_map(row), file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
