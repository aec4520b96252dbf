"""Runs the model over a batch and draws: the seam behind which a faster way of doing the same can stand.

Letters: B rows, L layers, K experts per token, C channels, V vocabulary, A alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.router import Routing
from model.sampling import draw, log_probabilities
from model.transformer import Transformer
from service.engine.batch import Batch, DecodeBatch, Layout, PrefillBatch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.sequence import Phase

MOST_GROUP_ROWS = 16
"""Padding every expert's group to a full house would multiply the work by the number of experts."""


class Runner(Protocol):
    """Forwards a batch, counts its experts and draws. Padding is neither counted nor returned."""

    name: str
    build: str
    """What else, beside the sources, decides bits: of the step that was compiled, its hash."""
    most_steps: int
    """How many steps one call can make."""
    most_prompt_tokens: int
    """How many tokens of several prompts together one call can read; a chunk of one prompt may have more."""

    @property
    def layout(self) -> Layout:
        """What batches have to fit."""

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        """So many steps of a decode batch, or one of prompts; None where none of them ends."""

    def clear(self, slot: int) -> None:
        """Make a slot's cache harmless."""

    def rebuild(self) -> None:
        """Begin with an empty cache, after a failure of unknown reach."""

    def pad_rows_to(self, multiple: int) -> None:
        """Compute in so many rows at a time: which multiples make a row's bits its own depends on the machine."""


class TorchRunner:
    """The plain path: eager torch on any device, one step a call."""

    name = "torch"
    build = str(torch.__version__)
    most_steps, most_prompt_tokens = 1, 0

    def __init__(self, model: Transformer, num_slots: int, counters: ExpertCounters) -> None:
        self._model = model
        self.counters = counters
        self._device = model.device
        # One slot more than are given out, for the rows of padding.
        self.layout = Layout(model.device, num_slots, model.config.num_layers, model.config.num_experts)
        self.cache = KVCache(model.config, num_slots + 1, model.device)

    @torch.inference_mode()
    def run(self, batch: Batch, steps: int) -> Drawn | None:
        assert steps == 1
        return self.prefill(batch) if isinstance(batch, PrefillBatch) else self._decode(batch)

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)

    def rebuild(self) -> None:
        self.cache.clear(slice(None))  # in place: there may be no room for a second one

    def pad_rows_to(self, multiple: int) -> None:
        self._model.pad_rows_to(min(multiple, MOST_GROUP_ROWS))
        self.layout = replace(self.layout, row_multiple=multiple)

    def prefill(self, batch: PrefillBatch) -> Drawn | None:
        (piece,) = batch.pieces
        num_rows, num_tokens = len(batch.ids), piece.num_tokens
        positions = torch.arange(piece.start, piece.start + num_rows, device=self._device)
        view = self.cache.prefill(piece.slot, piece.start, num_tokens, num_rows)
        hidden, routings = self._model.hidden(batch.ids[None], positions[None], view.layer, batch.wishes.disabled)
        real = [_rows(routing, slice(0, num_tokens)) for routing in routings]
        drawn = None
        if piece.draws:
            last = slice(num_tokens - 1, num_tokens)
            routed = [_rows(routing, last) for routing in real]
            drawn = self._draw(hidden[0, last], batch, positions[last] + 1, routed, 1)
        # Counted last, because a step that raises has fed nothing.
        self.counters.add(Phase.PREFILL, torch.full((num_tokens,), piece.slot, device=self._device), real)
        return drawn

    def _decode(self, batch: DecodeBatch) -> Drawn:
        view = self.cache.decode(batch.slots, batch.positions)
        ids, positions = batch.ids[:, None], batch.positions[:, None]
        hidden, routings = self._model.hidden(ids, positions, view.layer, batch.wishes.disabled)
        drawn = self._draw(hidden[:, 0], batch, batch.positions + 1, routings, batch.num_tokens)
        self.counters.add(Phase.DECODE, batch.slots, routings)
        return drawn

    def _draw(
        self, hidden: Tensor, batch: Batch, positions: Tensor, routings: Sequence[Routing], num_rows: int
    ) -> Drawn:
        """hidden (B, C), positions (B,) of the tokens to draw; only the first num_rows rows are somebody's."""
        logits = self._model.head(hidden)
        token_ids = draw(logits, batch.options, positions)
        wanted = batch.wishes.num_logprobs
        logprobs = None
        if wanted is not None:
            of_drawn, ids, best = log_probabilities(logits, token_ids, wanted)
            logprobs = of_drawn[None], ids[None], best[None]
        return Drawn(
            token_ids=token_ids[None, :num_rows],
            is_finite=logits.isfinite().all(dim=-1)[None, :num_rows],
            expert_ids=torch.stack([routing.expert_ids[:num_rows] for routing in routings], dim=1)[None],
            expert_weights=torch.stack([routing.expert_weights[:num_rows] for routing in routings], dim=1)[None],
            logprobs=logprobs,
        )


def _rows(routing: Routing, rows: slice) -> Routing:
    return Routing(routing.logits[rows], routing.expert_ids[rows], routing.expert_weights[rows])
