"""``python -m benchmarks.native``: where a native step's time goes, against what this machine can do in the same run.

At one row a step is bound by how fast weights arrive, so its bytes stand beside the bandwidth of memory and of the last
level of the cache; at many rows by multiplication, so its operations stand beside the quicker of torch's matrix
products. Also: how fast prompts are read, by torch too. Everything takes its turn in every round, a few times over, of
which the best counts; what is told are the medians of these bests. Prints a table for people and one JSON line for
machines, which is also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Result, command_line, take
from model import checkpoint
from model.config import ModelConfig
from model.experts import ROW_MULTIPLE
from model.sampling import SamplingBatch
from model.transformer import Transformer
from service.engine.batch import DecodeBatch, Piece, PrefillBatch, Wishes
from service.engine.counters import ExpertCounters
from service.engine.native.library import NoLibrary, load
from service.engine.native.runner import PARTS, NativeRunner, why_not
from service.engine.runner import Runner, TorchRunner
from service.engine.scheduler import PREFILL_ROWS

MATRIX = 768
BEYOND_CACHE = 2**28
WITHIN_CACHE = 12 * 2**20
"""Bytes that are read for the bandwidth of memory, and of a cache that is larger than those of the cores."""
BURST_S = 0.003
TRIES = 5
PRODUCTS: list[Callable[[Tensor], Tensor]] = [lambda square: square @ square]
"""Torch's own product, and that of oneDNN where torch has it: MKL reaches half of an AMD's peak."""
if torch.backends.mkldnn.is_available():
    PRODUCTS.append(lambda square: torch.ops.mkldnn._linear_pointwise(square, square, None, "none", [], ""))
SHARES = ("of_gemm", "of_memory", "of_cache")
NO_WISHES = Wishes(None, None)


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.native", "Where a native step's time goes.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N")
    parser.add_argument(
        "--position", type=int, default=139, metavar="N", help="of all rows; 139 is the middle of a race"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1000], metavar="N", help="their lengths")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help=f"each the best of {TRIES} tries")
    return parser.parse_args()


class Subject:
    """A native runner whose slots all hold a text that it has written."""

    def __init__(self, model: Transformer, slots: int, threads: int, position: int) -> None:
        self.runner = NativeRunner(load(), model, slots, _counters(model, slots), threads)
        self._ids = torch.arange(slots) % model.config.vocab_size
        self._position = 0
        while self._position < position:
            steps = min(self.runner.most_steps, position - self._position)
            drawn = self.runner.run(self._batch(slots), steps)
            assert drawn
            self._ids, self._position = drawn.token_ids[-1], self._position + steps

    def _batch(self, rows: int) -> DecodeBatch:
        slots, positions = torch.arange(rows), torch.full((rows,), self._position)
        return DecodeBatch(self._ids[:rows].contiguous(), slots, positions, rows, _options(rows), NO_WISHES)

    def step(self, rows: int, threads: int) -> tuple[float, Tensor]:
        """Seconds of one step, from a burst of them, and of its parts; the same step at every call."""
        self.runner.threads = threads
        batch, parts = self._batch(rows), torch.zeros(len(PARTS), dtype=torch.float64)
        one = _seconds(lambda: self.runner.run(batch, 1))
        steps = min(self.runner.most_steps, max(1, int(BURST_S / one)))
        seconds = _seconds(lambda: self.runner.run(batch, steps)) / steps
        self.runner.run(batch, steps, parts)
        return seconds, parts / steps


def _counters(model: Transformer, slots: int) -> ExpertCounters:
    return ExpertCounters(model.config, slots, model.device)


def _options(rows: int) -> SamplingBatch:
    reals = (torch.full((rows,), each, dtype=torch.float64) for each in (0.8, 1.0, 0.0))
    temperature, top_p, min_p = reals
    return SamplingBatch(temperature, torch.zeros(rows, dtype=torch.int64), top_p, min_p, torch.arange(rows))


@torch.inference_mode()
def read(runner: Runner, vocab_size: int, length: int, chunk: int = 128) -> None:
    """A prompt, as the engine has it read."""
    for start in range(0, length, chunk):
        tokens = min(chunk, length - start)
        ids = torch.arange(start, start + tokens) * 7 % vocab_size
        ids = F.pad(ids, (0, -tokens % PREFILL_ROWS)) if runner.layout.is_padded else ids
        draws = start + tokens == length
        runner.run(PrefillBatch(ids, (Piece(0, start, tokens, draws),), _options(int(draws)), NO_WISHES), 1)


def _seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def active_bytes(config: ModelConfig, position: int) -> int:
    """What one row's step reads: weights in bfloat16, keys and values in float32."""
    held = min(position + 1, config.context_length)
    return 2 * _active_weights(config) + 8 * config.num_layers * config.num_kv_heads * config.head_dim * held


def operations(config: ModelConfig, position: int) -> int:
    """Multiplications and additions of one row's step, in its products and in attention."""
    held = min(position + 1, config.context_length)
    return 2 * _active_weights(config) + 4 * config.num_layers * config.num_heads * config.head_dim * held


def _active_weights(config: ModelConfig) -> int:
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    experts = config.experts_per_token * config.matrices_per_expert * config.expert_size
    layer = config.hidden_size * (heads + config.num_experts + experts)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def measure(arguments: argparse.Namespace) -> Result:
    """Medians over the rounds of each one's best try; a share is of one round's figures: who slows down slows both."""
    torch.set_num_threads(arguments.threads)
    loaded = checkpoint.load(arguments.checkpoint, "cpu")
    config, position = loaded.config, arguments.position
    if reason := why_not(config):
        raise NoLibrary(reason)
    subject = Subject(loaded.model, max(arguments.rows), arguments.threads, position)
    plain = TorchRunner(loaded.model, 1, _counters(loaded.model, 1))
    plain.pad_rows_to(ROW_MULTIPLE)
    square, large, small = torch.randn(MATRIX, MATRIX), torch.ones(BEYOND_CACHE // 4), torch.ones(WITHIN_CACHE // 4)
    told: dict[tuple[str, int], list[float]] = defaultdict(list)
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for _ in range(arguments.rounds):
        gemm = 2 * MATRIX**3 / min(_seconds(partial(product, square)) for _ in range(TRIES) for product in PRODUCTS)
        memory = BEYOND_CACHE / min(_seconds(large.sum) for _ in range(TRIES))
        cache = WITHIN_CACHE / min(_seconds(small.sum) for _ in range(TRIES))
        for name, value in (("gemm", gemm), ("memory", memory), ("cache", cache)):
            told[name, 0].append(value / 1e9)
        for rows in arguments.rows:
            trials = [subject.step(rows, arguments.threads) for _ in range(TRIES)]
            seconds = min(step_s for step_s, _ in trials)
            parts[rows].append(min((of_step for _, of_step in trials), key=lambda each: each.sum().item()))
            told["step", rows].append(seconds)
            told["alone", rows].append(min(subject.step(rows, 1)[0] for _ in range(TRIES)))
            told["of_gemm", rows].append(operations(config, position) * rows / seconds / gemm)
            if rows == 1:  # several share what they read
                told["of_memory", rows].append(active_bytes(config, position) / seconds / memory)
                told["of_cache", rows].append(active_bytes(config, position) / seconds / cache)
        subject.runner.threads = arguments.threads
        for length in arguments.prompts:
            for name, runner in (("native", subject.runner), ("torch", plain)):
                told[name, length].append(
                    min(_seconds(partial(read, runner, config.vocab_size, length)) for _ in range(TRIES))
                )
    middle = {key: statistics.median(values) for key, values in told.items()}
    return {
        "gemm_gflops": round(middle["gemm", 0], 1),
        "memory_gb_s": round(middle["memory", 0], 1),
        "cache_gb_s": round(middle["cache", 0], 1),
        "active_bytes": active_bytes(config, position),
        "operations": operations(config, position),
        "steps": [_figures(rows, middle, parts[rows]) for rows in arguments.rows],
        "prompts": [
            {"length": n, **{name: round(n / middle[name, n]) for name in ("native", "torch")}}
            for n in arguments.prompts
        ],
    }


def _figures(rows: int, middle: dict[tuple[str, int], float], parts: list[Tensor]) -> dict[str, Any]:
    seconds = torch.stack(parts).median(dim=0).values
    shares = (seconds / seconds.sum()).tolist()
    return {
        "rows": rows,
        "us_per_step": round(middle["step", rows] * 1e6, 1),
        "tokens_per_second": round(rows / middle["step", rows]),
        "by_one_thread": round(rows / middle["alone", rows]),
        **{name: round(middle[name, rows], 3) for name in SHARES if (name, rows) in middle},
        "parts": {name: round(share, 4) for name, share in zip(PARTS, shares, strict=True)},
    }


def table(result: Result) -> str:
    steps = result["steps"]
    limits = (
        "{gemm_gflops} GFLOP/s in the quicker of torch's products, {memory_gb_s} GB/s from memory, "
        "{cache_gb_s} GB/s from the cache"
    )
    lines = [["rows", *(f"{step['rows']}" for step in steps)]]
    lines += [["tokens/s", *(f"{step['tokens_per_second']:,}" for step in steps)]]
    lines += [["1 thread", *(f"{step['by_one_thread']:,}" for step in steps)]]
    lines += [["us a step", *(f"{step['us_per_step']:,.0f}" for step in steps)]]
    for share in SHARES:
        lines += [[share.replace("_", " "), *(f"{step[share]:.0%}" if share in step else "" for step in steps)]]
    lines += [[part, *(f"{step['parts'][part]:.1%}" for step in steps)] for part in PARTS]
    told = [limits.format_map(result)]
    told += ["  ".join([name.ljust(9), *(cell.rjust(7) for cell in cells)]).rstrip() for name, *cells in lines]
    told += ["prompt of {length}: {native:,} tokens/s, torch {torch:,}".format_map(row) for row in result["prompts"]]
    return "\n".join(told)


def main() -> int:
    return 0 if take("native", parse(), measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
