"""``python -m benchmarks.drift``: where to draw the alert's line for drift.

Validation text in pieces of so many tokens, and random characters of the same alphabet: how far each layer's shares of
work are from the checkpoint's baseline (Jensen-Shannon, base 2), the median and the largest over pieces and layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import checkpoint
from model.routing import expert_counts
from model.transformer import Transformer
from service.expert_window import Floats, divergence
from training import corpora

SIZES = (1_000, 4_000, 16_000)


@torch.inference_mode()
def counts_of_windows(model: Transformer, ids: Tensor) -> Floats:
    """How many tokens each expert had in every window of context_length: ids (N,) -> (W, L, E)."""
    windows = ids[: len(ids) // model.config.context_length * model.config.context_length]
    batches = windows.view(-1, model.config.context_length)
    counts = [expert_counts(model(window[None])[1], model.config.num_experts) for window in batches]
    return torch.stack(counts).double().numpy()


def drifts(counts: Floats, windows: int, baseline: Floats) -> Floats:
    """Of pieces of so many windows, piece by piece and layer by layer: (W, L, E) -> (W // windows, L)."""
    whole = counts[: len(counts) // windows * windows]
    pieces = whole.reshape(-1, windows, *counts.shape[1:]).sum(axis=1)
    return divergence(pieces / pieces.sum(axis=-1, keepdims=True), baseline)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shakespeare"), metavar="FOLDER")
    parser.add_argument("--corpus", default="tinyshakespeare", help="whose validation text is read")
    parser.add_argument("--characters", type=int, default=112_000, metavar="N", help="to read at most, of each kind")
    arguments = parser.parse_args(given)
    loaded = checkpoint.load(arguments.checkpoint)
    baseline = np.array(loaded.training["routing_baseline"])
    text = torch.tensor(loaded.tokenizer.encode(corpora.load(arguments.corpus).validation[: arguments.characters]))
    chance = torch.randint(loaded.config.vocab_size, text.shape, generator=torch.Generator().manual_seed(1))
    print("tokens  validation text: median, largest   random characters: median, smallest")
    counts = [counts_of_windows(loaded.model, ids) for ids in (text, chance)]
    for size in SIZES:
        windows = -(-size // loaded.config.context_length)
        ordinary, odd = (drifts(each, windows, baseline) for each in counts)
        largest = odd.max(axis=-1)  # an alert looks at every layer
        print(
            f"{windows * loaded.config.context_length:6,}  {np.median(ordinary):23.4f}, {ordinary.max():.4f}"
            f"   {np.median(largest):25.4f}, {largest.min():.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
