"""Turns a plan into tensors. The only place where sequences meet arrays.

Letters: B rows of a decode step, padding included, T rows of prompts' chunks, P prompts, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.experts import ROW_MULTIPLE
from model.sampling import SamplingBatch
from service.engine.scheduler import DecodePlan, Plan, PrefillPlan
from service.engine.sequence import Sequence


@dataclass(frozen=True)
class Wishes:
    """What only some requests ask for, and None where nobody does.

    num_logprobs is the most alternatives that any row wants; disabled (B, L, E) of bool, or (P, L, E) for prompts.
    """

    num_logprobs: int | None
    disabled: Tensor | None


@dataclass(frozen=True)
class Piece:
    """num_tokens of a prompt, which lie in a slot from position start on; a token is drawn after the last if asked."""

    slot: int
    start: int
    num_tokens: int
    draws: bool


@dataclass(frozen=True)
class PrefillBatch:
    """A chunk of each of P prompts: ids (T,), one chunk after the other, each padded if the layout is.

    Options are of those that draw, disabled experts of all.
    """

    ids: Tensor
    pieces: tuple[Piece, ...]
    options: SamplingBatch
    wishes: Wishes


@dataclass(frozen=True)
class DecodeBatch:
    """One token for each of num_tokens sequences; ids, slots and positions (B,), where padding uses the spare slot."""

    ids: Tensor
    slots: Tensor
    positions: Tensor
    num_tokens: int
    options: SamplingBatch
    wishes: Wishes


Batch = PrefillBatch | DecodeBatch


@dataclass(frozen=True)
class Layout:
    """What a batch has to fit: decode rows in multiples, padding in a slot of nobody's, layers by experts."""

    device: torch.device
    spare_slot: int
    num_layers: int
    num_experts: int
    row_multiple: int = ROW_MULTIPLE

    @property
    def is_padded(self) -> bool:
        return self.row_multiple > 1


def build_batch(plan: Plan, layout: Layout) -> Batch:
    return _prefill(plan, layout) if isinstance(plan, PrefillPlan) else _decode(plan, layout)


def _prefill(plan: PrefillPlan, layout: Layout) -> PrefillBatch:
    ids: list[int] = []
    pieces = []
    for chunk in plan.chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        ids += sequence.prompt_ids[chunk.start : chunk.start + chunk.num_tokens]
        ids += [0] * (chunk.num_rows - chunk.num_tokens if layout.is_padded else 0)
        pieces.append(Piece(sequence.slot, chunk.start, chunk.num_tokens, chunk.completes_the_prompt))
    return PrefillBatch(
        torch.tensor(ids, device=layout.device),
        tuple(pieces),
        _options(list(plan.sequences), 0, layout.device),
        _wishes([chunk.sequence for chunk in plan.chunks], 0, layout),
    )


def _decode(plan: DecodePlan, layout: Layout) -> DecodeBatch:
    sequences = list(plan.sequences)
    padding = -len(sequences) % layout.row_multiple
    columns = (
        [sequence.token_ids[-1] for sequence in sequences] + [0] * padding,
        [sequence.slot for sequence in sequences] + [layout.spare_slot] * padding,
        [sequence.num_fed for sequence in sequences] + [0] * padding,
    )
    ids, slots, positions = torch.tensor(columns, device=layout.device)
    options = _options(sequences, padding, layout.device)
    return DecodeBatch(ids, slots, positions, len(sequences), options, _wishes(sequences, padding, layout))


def _wishes(sequences: list[Sequence], padding: int, layout: Layout) -> Wishes:
    wanted = [sequence.num_logprobs for sequence in sequences if sequence.num_logprobs is not None]
    disabled = None
    if any(sequence.params.disabled_experts for sequence in sequences):
        shape = (len(sequences) + padding, layout.num_layers, layout.num_experts)
        disabled = torch.zeros(shape, dtype=torch.bool)
        gone = [(row, *pair) for row, each in enumerate(sequences) for pair in each.params.disabled_experts]
        disabled[tuple(torch.tensor(gone).T)] = True
        disabled = disabled.to(layout.device)
    return Wishes(max(wanted, default=None), disabled)


def _options(sequences: list[Sequence], padding: int, device: torch.device) -> SamplingBatch:
    params = [sequence.params for sequence in sequences]
    reals = [(p.temperature, p.top_p, p.min_p) for p in params] + [(0.0, 1.0, 0.0)] * padding
    integers = [(p.top_k, p.seed) for p in params] + [(0, 0)] * padding
    temperature, top_p, min_p = torch.tensor(reals, dtype=torch.float64, device=device).view(-1, 3).unbind(1)
    top_k, seed = torch.tensor(integers, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    return SamplingBatch(temperature, top_k, top_p, min_p, seed)
