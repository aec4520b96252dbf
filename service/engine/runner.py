"""Runs the model over a batch and draws: the seam behind which a faster way of doing the same can stand.

Letters: B rows, L layers, K experts per token, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.router import Routing
from model.sampling import SamplingBatch, draw
from model.transformer import Transformer
from service.engine.batch import Batch, DecodeBatch, PrefillBatch
from service.engine.counters import ExpertCounters
from service.engine.sequence import Phase


@dataclass(frozen=True)
class Drawn:
    """What a step drew, row by row: token_ids, is_finite (B,) and the routing they were drawn from, both (B, L, K)."""

    token_ids: Tensor
    is_finite: Tensor
    expert_ids: Tensor
    expert_weights: Tensor


class Runner(Protocol):
    """Forwards a batch, counts its experts and draws. Padding is neither counted nor returned."""

    name: str
    spare_slot: int
    device: torch.device

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        """None after a chunk that does not end its prompt."""

    def clear(self, slot: int) -> None:
        """Make a slot's cache harmless."""

    def rebuild(self) -> None:
        """Begin with an empty cache, after a failure of unknown reach."""


class TorchRunner:
    """The plain path: eager torch on any device, one step a call."""

    name = "torch"

    def __init__(self, model: Transformer, num_slots: int, counters: ExpertCounters) -> None:
        self._model = model
        self._counters = counters
        self.spare_slot = num_slots  # one slot more than are given out, for the rows of padding
        self.device = model.device
        self.rebuild()

    @torch.inference_mode()
    def run(self, batch: Batch, steps: int) -> Drawn | None:
        assert steps == 1
        return self._prefill(batch) if isinstance(batch, PrefillBatch) else self._decode(batch)

    def clear(self, slot: int) -> None:
        self._cache.clear(slot)

    def rebuild(self) -> None:
        self._cache = KVCache(self._model.config, self.spare_slot + 1, self.device)

    def _prefill(self, batch: PrefillBatch) -> Drawn | None:
        num_rows, num_tokens = len(batch.ids), batch.num_tokens
        positions = torch.arange(batch.start, batch.start + num_rows, device=self.device)
        view = self._cache.prefill(batch.slot, batch.start, num_tokens, num_rows)
        hidden, routings = self._model.hidden(batch.ids[None], positions[None], view.layer)
        real = [_rows(routing, slice(0, num_tokens)) for routing in routings]
        drawn = None
        if batch.draws:
            last = slice(num_tokens - 1, num_tokens)
            routed = [_rows(routing, last) for routing in real]
            drawn = self._draw(hidden[0, last], batch.options, positions[last] + 1, routed, 1)
        # Counted last, because a step that raises has fed nothing.
        self._counters.add(Phase.PREFILL, torch.full((num_tokens,), batch.slot, device=self.device), real)
        return drawn

    def _decode(self, batch: DecodeBatch) -> Drawn:
        view = self._cache.decode(batch.slots, batch.positions)
        hidden, routings = self._model.hidden(batch.ids[:, None], batch.positions[:, None], view.layer)
        drawn = self._draw(hidden[:, 0], batch.options, batch.positions + 1, routings, batch.num_tokens)
        self._counters.add(Phase.DECODE, batch.slots, routings)
        return drawn

    def _draw(
        self, hidden: Tensor, options: SamplingBatch, positions: Tensor, routings: Sequence[Routing], num_rows: int
    ) -> Drawn:
        """hidden (B, C), positions (B,) of the tokens to draw; only the first num_rows rows are somebody's."""
        logits = self._model.head(hidden)
        return Drawn(
            token_ids=draw(logits, options, positions)[:num_rows],
            is_finite=logits.isfinite().all(dim=-1)[:num_rows],
            expert_ids=torch.stack([routing.expert_ids[:num_rows] for routing in routings], dim=1),
            expert_weights=torch.stack([routing.expert_weights[:num_rows] for routing in routings], dim=1),
        )


def _rows(routing: Routing, rows: slice) -> Routing:
    return Routing(routing.logits[rows], routing.expert_ids[rows], routing.expert_weights[rows])
