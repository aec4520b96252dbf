"""What a model has to beat, and the unit in which models with different tokenizers can be compared. Knows no model."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bigram_loss(train_ids: Tensor, validation_ids: Tensor, vocab_size: int) -> float:
    """Nats per validation token of add-one smoothed bigram counts: P(b | a) = (n(ab) + 1) / (n(a) + V).

    train_ids and validation_ids (N,), at least two ids each. Only pairs of the validation text are counted: there are P
    of them, where a table of all pairs would have V * V entries.
    """
    wanted, index = _pairs(validation_ids, vocab_size).unique(return_inverse=True)  # (P), (N_validation - 1)
    pairs = _pairs(train_ids, vocab_size)
    nearest = torch.searchsorted(wanted, pairs).clamp(max=len(wanted) - 1)  # (N_train - 1)
    seen = torch.bincount(nearest[wanted[nearest] == pairs], minlength=len(wanted))  # (P)
    firsts = torch.bincount(train_ids[:-1], minlength=vocab_size)  # (V)
    losses = (firsts[validation_ids[:-1]] + vocab_size).double().log() - (seen[index] + 1).double().log()
    return losses.mean().item()


def bits_per_character(nats_per_token: float, num_tokens: int, num_characters: int) -> float:
    """A loss over num_tokens tokens as bits for each of the num_characters characters that they spell."""
    return nats_per_token * num_tokens / num_characters / math.log(2)


def _pairs(ids: Tensor, vocab_size: int) -> Tensor:
    """One number for each pair of neighbours, (N - 1,)."""
    return ids[:-1] * vocab_size + ids[1:]
