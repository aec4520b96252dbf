"""``python -m benchmarks.race``: our server and others with the same weights, the same client and the same requests.

One server is alive at a time, and they take turns in rounds, so that a machine that slows down slows all. Every answer
fits into the context with its prompt: llama.cpp has no window. Prints a table, and keeps all of it in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks import environments, report
from benchmarks.contestants import CONTESTANTS, NO_PEERS, OURS, Setting, is_peer, label
from benchmarks.over_http import HttpTrial, measure, peak_mib
from benchmarks.record import TROUBLES, Result, Trouble, command_line, in_one_line, take
from benchmarks.workload import REQUESTS, Workload
from model import checkpoint


@dataclass
class Standing:
    """What one contestant has shown so far, by the number of streams."""

    trials: dict[int, list[HttpTrial]]
    about: dict[str, Any] = field(default_factory=dict)
    peak_mib: float = 0.0
    trouble: str | None = None


def compete(setting: Setting, arguments: argparse.Namespace, workload: Workload) -> dict[str, Standing]:
    """Rounds in which every contestant that has not failed starts, is measured and ends. Raises Trouble."""
    standings = {name: Standing({streams: [] for streams in arguments.streams}) for name in arguments.contestants}
    for number in range(arguments.rounds):
        for name, standing in standings.items():
            if standing.trouble:
                continue
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                with CONTESTANTS[name](setting) as server:
                    standing.about = server.about
                    for streams, kept in standing.trials.items():
                        vocabulary = setting.loaded.tokenizer.tokens
                        kept.append(measure(server.url, workload, streams, vocabulary, server.dialect, server.pid))
                    standing.peak_mib = max(standing.peak_mib, peak_mib(server.pid))
            except TROUBLES as error:
                standing.trouble = in_one_line(error)
                require_a_race(standings)
                print(f"{name} is out: {standing.trouble}", file=sys.stderr, flush=True)
    return standings


def figures(standings: dict[str, Standing]) -> dict[str, Any]:
    """Who was in trouble has none: some rounds of one are no medians beside all of the others'."""
    return {
        name: {
            "about": standing.about,
            "peak_mib": round(standing.peak_mib),
            "trouble": standing.trouble,
            "cores_of_others": report.cores_of_others([each for trials in standing.trials.values() for each in trials]),
            "streams": {}
            if standing.trouble
            else {streams: report.over_http(trials) for streams, trials in standing.trials.items()},
        }
        for name, standing in standings.items()
    }


def require_a_race(standings: Mapping[str, Standing]) -> None:
    """Raises Trouble as soon as one of ours has failed, or all peers have, or all that there are."""
    peers = [name for name in standings if is_peer(name)]
    needed = [name for name in standings if name.startswith(OURS)]
    for all_of in (peers, list(standings)):
        if all(standings[name].trouble for name in all_of):
            needed += all_of
    for name in needed:
        if trouble := standings[name].trouble:
            raise Trouble(f"this is no race, and nothing is kept: {name}: {trouble}")


def ratios(found: dict[str, Any]) -> dict[int, float]:
    """Our tokens per second over those of the quickest other with our weights, by the streams that both have served.

    Medians over the rounds of each round's ratio: a machine that slows down slows all in a round. None at all where a
    peer is out: it may have been the quickest.
    """
    if any(each["trouble"] for name, each in found.items() if is_peer(name)):
        return {}
    ours, theirs = (defaultdict[int, list[list[float]]](list) for _ in range(2))
    for name, each in found.items():
        if name not in NO_PEERS:
            for streams, row in each["streams"].items():
                (theirs if is_peer(name) else ours)[streams].append(row["rounds"])
    return {
        streams: round(statistics.median(map(truediv, _quickest(ours[streams]), _quickest(theirs[streams]))), 2)
        for streams in ours
        if streams in theirs
    }


def _quickest(contestants: list[list[float]]) -> list[float]:
    """Of each round."""
    return [max(rates) for rates in zip(*contestants, strict=True)]


def table(result: Result) -> str:
    """Markdown: a line for each number of streams of each contestant; then the ratios, and who was in trouble."""
    found = result["contestants"]
    lines = [
        "| streams | server | tokens/s | first token p50, p95, ms | next token p50, p95, p99 | CPU us/token, client |",
        "|---|---|---|---|---|---|",
    ]
    counts = sorted({streams for each in found.values() for streams in each["streams"]})
    for streams in counts:
        for name, each in found.items():
            if (row := each["streams"].get(streams)) is None:
                continue
            first, gap = row["first_token_ms"], row["inter_token_ms"]
            lines.append(
                f"| {streams} | {label(name)} | {row['tokens_per_second']:,.0f} | "
                f"{first['p50']:.1f}, {first['p95']:.1f} | "
                f"{gap['p50']:.2f}, {gap['p95']:.2f}, {gap['p99']:.2f} | {row['cpu_us_per_token']:,.0f}, "
                f"{row['client_cpu_us_per_token']:.0f} |"
            )
    lines.append(f"ours over the quickest other, by streams: {result['ratios'] or 'not all of them have served'}")
    lines += [f"{name} is out: {each['trouble']}" for name, each in found.items() if each["trouble"]]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("benchmarks.race", "Our server and others with the same weights, client and requests.")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="at the same time")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=150, metavar="N")
    parser.add_argument("--environments", type=Path, default=environments.FOLDER, metavar="FOLDER")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> Result:
    """Raises Trouble."""
    workload = Workload(arguments.requests, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as files:
        loaded = checkpoint.load(arguments.checkpoint)
        if workload.prompt_characters + workload.new_tokens > loaded.config.context_length:
            raise Trouble(f"prompt and text have to fit into {loaded.config.context_length}: llama.cpp has no window")
        setting = Setting(loaded, max(arguments.streams), arguments.threads, arguments.environments, Path(files))
        found = figures(compete(setting, arguments, workload))
    known = [each["cores_of_others"] for each in found.values() if each["cores_of_others"] is not None]
    return {
        "prompt_characters": workload.prompt_characters,
        "contestants": found,
        "ratios": ratios(found),
        "cores_of_others": max(known, default=None),  # beside whom it was worst
    }


def main(given: Sequence[str] | None = None) -> int:
    return 0 if take("race", parse(given), run, table) else 1


if __name__ == "__main__":
    sys.exit(main())
