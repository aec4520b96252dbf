"""What a model has to beat, and the unit in which models with different tokenizers can be compared. Knows no model."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bigram_loss(train_ids: Tensor, validation_ids: Tensor, vocab_size: int) -> float:
    """Nats per validation token of add-one smoothed bigram counts: P(b | a) = (n(ab) + 1) / (n(a) + V).

    train_ids and validation_ids (N,), at least two ids each.
    """
    counts = torch.bincount(_pairs(train_ids, vocab_size), minlength=vocab_size**2).view(vocab_size, vocab_size)
    smoothed = counts.double() + 1
    losses = smoothed.sum(-1, keepdim=True).log() - smoothed.log()  # (V, V)
    return losses.flatten()[_pairs(validation_ids, vocab_size)].mean().item()


def bits_per_character(nats_per_token: float, num_tokens: int, num_characters: int) -> float:
    """A loss over num_tokens tokens as bits for each of the num_characters characters that they spell."""
    return nats_per_token * num_tokens / num_characters / math.log(2)


def _pairs(ids: Tensor, vocab_size: int) -> Tensor:
    """One number for each pair of neighbours, (N - 1,)."""
    return ids[:-1] * vocab_size + ids[1:]
