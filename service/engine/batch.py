"""Turns a plan into tensors. The only place where sequences meet arrays.

Letters: B rows of a decode step padded to a multiple of 4, T rows of a prompt's chunk.
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
class PrefillBatch:
    """A chunk of one prompt: ids (T,), of which num_tokens are real; draws after its last token if asked."""

    ids: Tensor
    slot: int
    start: int
    num_tokens: int
    draws: bool
    options: SamplingBatch


@dataclass(frozen=True)
class DecodeBatch:
    """One token for each of num_tokens sequences; ids, slots and positions (B,), where padding uses the spare slot."""

    ids: Tensor
    slots: Tensor
    positions: Tensor
    num_tokens: int
    options: SamplingBatch


Batch = PrefillBatch | DecodeBatch


def build_batch(plan: Plan, spare_slot: int, device: torch.device) -> Batch:
    if isinstance(plan, PrefillPlan):
        return _prefill(plan, device)
    return _decode(plan, spare_slot, device)


def _prefill(plan: PrefillPlan, device: torch.device) -> PrefillBatch:
    sequence = plan.sequence
    assert sequence.slot is not None
    ids = list(sequence.prompt_ids[plan.start : plan.start + plan.num_tokens])
    ids += [0] * (plan.num_rows - plan.num_tokens)
    return PrefillBatch(
        ids=torch.tensor(ids, device=device),
        slot=sequence.slot,
        start=plan.start,
        num_tokens=plan.num_tokens,
        draws=plan.completes_the_prompt,
        options=_options([sequence], 0, device),
    )


def _decode(plan: DecodePlan, spare_slot: int, device: torch.device) -> DecodeBatch:
    sequences = plan.sequences
    padding = -len(sequences) % ROW_MULTIPLE
    columns = (
        [sequence.token_ids[-1] for sequence in sequences] + [0] * padding,
        [sequence.slot for sequence in sequences] + [spare_slot] * padding,
        [sequence.num_fed for sequence in sequences] + [0] * padding,
    )
    ids, slots, positions = torch.tensor(columns, device=device)
    return DecodeBatch(ids, slots, positions, len(sequences), _options(list(sequences), padding, device))


def _options(sequences: list[Sequence], padding: int, device: torch.device) -> SamplingBatch:
    params = [sequence.params for sequence in sequences]
    reals = torch.tensor(
        ([p.temperature for p in params] + [0.0] * padding, [p.top_p for p in params] + [1.0] * padding),
        dtype=torch.float64,
        device=device,
    )
    integers = torch.tensor(
        ([p.top_k for p in params] + [0] * padding, [p.seed for p in params] + [0] * padding), device=device
    )
    return SamplingBatch(temperature=reals[0], top_p=reals[1], top_k=integers[0], seed=integers[1])
