"""``python -m benchmarks``: tokens per second of the engine alone, at several numbers of streams, interleaved.

Prints a table for people and one JSON line for machines, which is also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from service.cpus import usable_cpus
from service.engine.engine import Engine
from service.engine.loading import EngineOptions, build_engine
from service.engine.sequence import SamplingParams, Sequence

RESULTS = Path(__file__).parent / "results"
STREAMS = (1, 8, 32, 64)
PROMPT_TOKENS = 64


def decode_rate(engine: Engine, streams: int, new_tokens: int) -> float:
    """Tokens per second of so many equal streams, from the last prompt read to the first end."""
    prompt = tuple(range(2)) * (PROMPT_TOKENS // 2)
    sequences = [Sequence(prompt, SamplingParams(new_tokens, seed=seed)) for seed in range(streams)]
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.token_ids for sequence in sequences):
        engine.step()
    drawn = sum(len(sequence.token_ids) for sequence in sequences)
    started = time.perf_counter()
    while not any(sequence.is_finished for sequence in sequences):
        engine.step()
    seconds = time.perf_counter() - started
    rate = (sum(len(sequence.token_ids) for sequence in sequences) - drawn) / seconds
    while engine.has_work:
        engine.step()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=150)
    arguments = parser.parse_args()
    options = EngineOptions(arguments.checkpoint, "auto", usable_cpus(), max(STREAMS), 1024, 128)
    engine, info = build_engine(options, lambda phase: None)
    rounds = [
        {streams: decode_rate(engine, streams, arguments.new_tokens) for streams in STREAMS}
        for _ in range(arguments.rounds)
    ]
    medians = {streams: statistics.median(rates[streams] for rates in rounds) for streams in STREAMS}
    print(f"engine alone, {info.runner} on {info.device}, {info.threads} threads; median of {len(rounds)} rounds")
    print("streams   tokens/s   of one stream")
    for streams, rate in medians.items():
        print(f"{streams:7d} {rate:10,.0f} {rate / medians[1]:12.1f} x")
    now = datetime.now(UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": info.threads, "device": info.device},
        "checkpoint": str(arguments.checkpoint),
        "runner": info.runner,
        "torch": info.torch_version,
        "engine_tokens_per_second": {str(streams): round(rate, 1) for streams, rate in medians.items()},
    }
    line = json.dumps(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"engine-{now.date()}.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
