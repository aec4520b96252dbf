"""``python -m benchmarks.drift``: how far the experts' shares stray from the checkpoint's baseline, and from even load.

The model reads as the service does, through the ring cache: the validation text that the baseline is of; its own text,
drawn at temperature 0.8; random characters. Each is cut into windows, from the least of which the service tells a
drift. The alert lines of deploy/prometheus/rules.yml lie between what the first two come to and what the last does.
Prints a table for people and one JSON line for machines, which is also kept in benchmarks/results/.

Letters: L layers, E experts, T tokens, W windows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import Result, command_line, take
from model import checkpoint
from model.checkpoint import Checkpoint
from model.kv_cache import KVCache
from model.routing import expert_counts
from model.transformer import Transformer
from service.expert_window import LEAST_TOKENS, Floats, divergence
from training import corpora, sample
from training.record import require_text_of

CHUNK = 250  # so that the least tokens of a window are a whole number of them
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.drift", "Routing drift of known texts.")
    parser.add_argument("--data", type=Path, metavar="FILE", help="what it was trained on, if that was a file")
    parser.add_argument("--windows", type=int, nargs="+", default=[LEAST_TOKENS, 4_000, 16_000], metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=48_000, metavar="N", help="of the validation text")
    parser.add_argument("--random", type=int, default=16_000, metavar="N", help="random characters")
    parser.add_argument("--own", type=int, default=8_000, metavar="N", help="tokens that the model writes itself")
    given = parser.parse_args()
    if any(window <= 0 or window % CHUNK for window in given.windows):
        parser.error(f"--windows are multiples of {CHUNK}")
    return given


def texts(loaded: Checkpoint, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Ids by the name of the text."""
    name = loaded.training["corpus"]["name"]
    corpus = corpora.from_file(arguments.data) if arguments.data else corpora.load(name)
    require_text_of(loaded, corpus)  # the baseline is of that
    ids = loaded.tokenizer.encode(corpus.validation)
    drawn = sample.stream(
        loaded.model, ids[: loaded.config.context_length], arguments.own, temperature=0.8, top_k=0, top_p=1.0, seed=1
    )
    generator = torch.Generator().manual_seed(1)
    return {
        "validation text": torch.tensor(ids[: arguments.tokens]),
        "its own text": torch.tensor(list(drawn)),
        "random characters": torch.randint(loaded.config.vocab_size, (arguments.random,), generator=generator),
    }


@torch.inference_mode()
def counts_by_chunk(model: Transformer, ids: Tensor) -> Tensor:
    """Which experts worked on each CHUNK of a text that is read as one stream: (T,) -> (T / CHUNK, L, E)."""
    cache = KVCache(model.config, num_slots=1, device=ids.device)
    counts = []
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        _, routings = sample.read(model, cache, ids[start : start + CHUNK], start)
        counts.append(expert_counts(routings, model.config.num_experts))
    return torch.stack(counts)


def figures(text: str, counts: Tensor, window: int, baseline: Floats) -> Figures | None:
    """Of the windows of one size, by their worst layer; None where the text fills none."""
    per_window = window // CHUNK
    whole = counts[: len(counts) // per_window * per_window].unflatten(0, (-1, per_window)).sum(dim=1)  # (W, L, E)
    if not len(whole):
        return None
    share = (whole / whole.sum(dim=-1, keepdim=True)).double().numpy()
    drift = divergence(share, baseline)  # (W, L)
    load = share.max(axis=-1) * share.shape[-1]
    return {
        "text": text,
        "window": window,
        "windows": len(whole),
        **_spread("drift", drift.max(axis=-1), 5),
        **_spread("max_load_ratio", load.max(axis=-1), 3),
        "least_share_of_even": round(float(share.min()) * share.shape[-1], 3),
    }


def _spread(name: str, values: Floats, digits: int) -> Figures:
    spread = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {f"{name}_{which}": round(float(value), digits) for which, value in spread.items()}


def table(result: Result) -> str:
    rows: Sequence[Figures] = result["figures"]
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, cells, widths)) for cells in lines)


def measure(arguments: argparse.Namespace) -> Result:
    torch.set_num_threads(arguments.threads)
    loaded = checkpoint.load(arguments.checkpoint)
    baseline = np.array(loaded.training["routing_baseline"])
    read = {name: counts_by_chunk(loaded.model, ids) for name, ids in texts(loaded, arguments).items()}
    rows = [figures(name, counts, window, baseline) for name, counts in read.items() for window in arguments.windows]
    return {"figures": [row for row in rows if row], "cores_of_others": None}  # nothing is timed here


def main() -> int:
    return 0 if take("drift", parse(), measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
