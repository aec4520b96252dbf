"""How good a model is on a text: loss over exact windows, loss as one endless stream, and the load of its experts.

Letters: W windows, T context_length, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.routing import expert_counts, load_entropy_ratio, max_load_ratio
from model.transformer import Transformer
from training import Refused
from training.sample import read

TOKENS_AT_ONCE, LOGITS_AT_ONCE = 24 * 256, 2**26
"""What is scored at once, unless one window has more: some hundred MB."""


class TooShort(Refused):
    """A text does not fill one window. One sentence."""


@dataclass(frozen=True)
class Evaluation:
    """loss in nats per token over num_windows windows of context_length inputs; counts (L, E) of routed tokens."""

    loss: float
    num_windows: int
    counts: Tensor

    @property
    def shares(self) -> list[list[float]]:
        """The share of each layer's work that each expert does, [layer][expert]."""
        return [
            [round(share, 6) for share in layer] for layer in (self.counts / self.counts.sum(-1, keepdim=True)).tolist()
        ]

    @property
    def max_load(self) -> float:
        """max/mean load of the layer that is worst balanced."""
        return float(max_load_ratio(self.counts).max())

    @property
    def min_entropy(self) -> float:
        return float(load_entropy_ratio(self.counts).min())

    @property
    def num_idle(self) -> int:
        return int((self.counts == 0).sum())


def windows_at_once(config: ModelConfig) -> int:
    return max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // config.vocab_size) // config.context_length)


def spread_windows(ids: Tensor, length: int, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` exact windows, spread evenly over a text: inputs and targets (W, T). Raises TooShort."""
    available = (len(ids) - 1) // length
    if available < 1:
        raise TooShort(f"the validation text has {len(ids)} tokens; at least {length + 1} are needed")
    chosen = torch.linspace(0, available - 1, min(most, available), dtype=torch.float64, device=ids.device)
    rows = chosen.round().long()[:, None] * length + torch.arange(length + 1, device=ids.device)
    return ids[rows[:, :-1]], ids[rows[:, 1:]]


@torch.inference_mode()
def evaluate(model: Transformer, ids: Tensor, most_tokens: int | None = None) -> Evaluation:
    """Cut ids into exact windows of context_length inputs, each with the next token as target, and score them.

    With most_tokens as many windows as have no more, at least one, spread evenly. Raises TooShort.
    """
    config = model.config
    most_windows = max(1, (len(ids) if most_tokens is None else most_tokens) // config.context_length)
    inputs, targets = spread_windows(ids, config.context_length, most_windows)
    total, counts = 0.0, torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64, device=ids.device)
    at_once = windows_at_once(config)
    for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        logits, routings = model(x)
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        counts += expert_counts(routings, config.num_experts)
    return Evaluation(total / targets.numel(), len(inputs), counts)


@torch.inference_mode()
def stream_loss(model: Transformer, ids: Tensor) -> float:
    """Nats per token when ids are read as one endless stream through the ring cache, as the service reads them."""
    cache = KVCache(model.config, num_slots=1, device=ids.device)
    chunk = model.config.context_length
    total = 0.0
    for start in range(0, len(ids) - 1, chunk):
        x = ids[start : min(start + chunk, len(ids) - 1)]
        hidden, _ = read(model, cache, x, start)
        total += F.cross_entropy(model.head(hidden[0]), ids[start + 1 : start + 1 + len(x)], reduction="sum").item()
    return total / (len(ids) - 1)
