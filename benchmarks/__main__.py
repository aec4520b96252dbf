"""``python -m benchmarks``: the engine alone and a server over HTTP, in turn, under the same closed loop of requests.

Prints a table for people and one JSON line for machines, which is also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import report
from benchmarks.engine import EngineTrial, engine_process
from benchmarks.over_http import HttpTrial, server_process
from benchmarks.record import Result, command_line, take
from benchmarks.workload import REQUESTS, Workload
from service.engine.loading import EngineOptions


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks", "How fast the engine is, alone and over HTTP.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of engine and HTTP in turn")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=150, metavar="N")
    parser.add_argument("--prompt-characters", type=int, default=64, metavar="N")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> Result:
    """What was measured, and the figures of each number of streams."""
    workload = Workload(arguments.requests, arguments.new_tokens, arguments.prompt_characters)
    checkpoint, slots, threads = arguments.checkpoint, max(arguments.streams), arguments.threads
    options = EngineOptions(checkpoint, "auto", threads, slots, kv_memory_mib=1024, prefill_chunk=128)
    trials: dict[int, tuple[list[EngineTrial], list[HttpTrial]]] = {each: ([], []) for each in arguments.streams}
    with engine_process(options) as engine, server_process(checkpoint, slots, threads) as server:
        for streams in arguments.streams * arguments.rounds:
            alone, over_http = trials[streams]
            alone.append(engine.trial(workload, streams))
            over_http.append(server.trial(workload, streams))
    return {
        **{name: getattr(engine.info, name) for name in ("runner", "device", "threads")},
        "figures": [report.figures(streams, *pair) for streams, pair in trials.items()],
    }


def table(result: Result) -> str:
    head = "{checkpoint}: {runner} on {device}, {threads} threads, torch {torch}; one stream alone had {rounds} x"
    tail = "{requests} requests of {prompt_characters} characters and {new_tokens} tokens, each of many fewer"
    return f"{head.format_map(result)}\n{tail.format_map(result)}\n{report.table(result['figures'])}"


def main() -> int:
    return 0 if take("http", parse(), measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
