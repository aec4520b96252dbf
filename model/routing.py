"""Counting which experts worked: the one definition that training, evaluation and serving share.

Letters: N tokens, K experts per token, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.router import Routing

WEIGHT_SCALE = 2**24
"""Gate weight is summed as round(weight x 2^24) in int64: integer sums do not depend on their order."""


def expert_counts(routings: Sequence[Routing], num_experts: int) -> Tensor:
    """How many tokens each expert took: one Routing per layer -> (L, E) int64. Every row sums to K x N."""
    ids = torch.stack([routing.expert_ids.flatten() for routing in routings])  # (L, N * K)
    counts = ids.new_zeros(len(routings), num_experts)
    return counts.scatter_add_(1, ids, torch.ones_like(ids))


def fixed_point(weights: Tensor) -> Tensor:
    """Gate weights as integers in units of 2^-24. A weight that is not finite counts as nothing: it has no integer."""
    return (weights.double().nan_to_num(0.0, posinf=0.0, neginf=0.0) * WEIGHT_SCALE).round().long()


def max_load_ratio(counts: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, 1 at balance: (..., E) -> (...)."""
    return counts.amax(-1) / counts.double().mean(-1)


def load_entropy_ratio(counts: Tensor) -> Tensor:
    """Entropy of the load over that of a uniform one; 1 at balance, 0 when one of several does it all."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    if counts.shape[-1] == 1:  # the only expert's load is even, and its entropy nothing
        return share.squeeze(-1)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy / math.log(counts.shape[-1])
