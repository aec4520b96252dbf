"""``python -m benchmarks``: the engine alone and a server over HTTP, in turn, under the same closed loop of requests.

Prints a table for people and one JSON line for machines, which is also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks import report
from benchmarks.engine import EngineProcess, engine_process
from benchmarks.over_http import Target, server_process
from benchmarks.record import Result, command_line, take
from benchmarks.workload import REQUESTS, Workload
from service.engine.loading import EngineOptions


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks", "How fast the engine is, alone and over HTTP.")
    parser.add_argument("--server", metavar="URL", help="measure a server that is running already, over HTTP")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of engine and HTTP in turn")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=150, metavar="N")
    parser.add_argument("--prompt-characters", type=int, default=64, metavar="N")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> Result:
    """What was measured, and the figures of each number of streams."""
    workload = Workload(arguments.requests, arguments.new_tokens, arguments.prompt_characters)
    trials: dict[int, tuple[list[Any], list[Any]]] = {streams: ([], []) for streams in arguments.streams}
    with ExitStack() as stack:
        engine, target = _engine(arguments, stack), _target(arguments, stack)
        for streams in arguments.streams * arguments.rounds:
            for subject, kept in zip((engine, target), trials[streams], strict=True):
                if subject:
                    kept.append(subject.trial(workload, streams))
    facts = asdict(engine.info) if engine else target.info
    elsewhere = {"checkpoint": arguments.server, "manifest": facts.get("checkpoint"), "cores_of_others": None}
    return {
        **(elsewhere if arguments.server else {}),
        **{name: facts[name] for name in ("runner", "device", "threads")},
        "torch": facts["torch_version"] if engine else facts["versions"]["torch"],
        "figures": [report.figures(streams, *pair) for streams, pair in trials.items()],
    }


def _engine(arguments: argparse.Namespace, stack: ExitStack) -> EngineProcess | None:
    if arguments.server:
        return None
    options = EngineOptions(arguments.checkpoint, "auto", arguments.threads, max(arguments.streams), 1024, 128)
    return stack.enter_context(engine_process(options))


def _target(arguments: argparse.Namespace, stack: ExitStack) -> Target:
    if arguments.server:
        return Target(arguments.server)
    return stack.enter_context(server_process(arguments.checkpoint, max(arguments.streams), arguments.threads))


def table(result: Result) -> str:
    head = "{checkpoint}: {runner} on {device}, {threads} threads, torch {torch}; one stream alone had {rounds} x"
    tail = "{requests} requests of {prompt_characters} characters and {new_tokens} tokens, each of many fewer"
    return f"{head.format_map(result)}\n{tail.format_map(result)}\n{report.table(result['figures'])}"


def main() -> int:
    return 0 if take("http", parse(), measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
