"""Chooses the experts of every token, and says what it decided. Knows nothing of what the experts compute.

Letters: N tokens, C channels, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """One layer's decision for N tokens: logits (N, E), expert_ids and expert_weights (N, K); weights sum to 1."""

    logits: Tensor
    expert_ids: Tensor
    expert_weights: Tensor


class Router(nn.Module):
    """Softmax over the top-k logits (Shazeer et al. 2017, eq. 3-5, without noise), in float32.

    There is no noise, no capacity and no chance here: a token's experts depend on the token's own state alone.
    """

    def __init__(self, channels: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, channels))

    def forward(self, x: Tensor, disabled: Tensor | None = None) -> Routing:
        """x (N, C) -> Routing. disabled (N or 1, E) of bool: experts that a token must do without."""
        logits = F.linear(x.float(), self.weight.float())
        if disabled is not None:
            logits = logits.masked_fill(disabled, -torch.inf)
        chosen = logits.topk(self.experts_per_token, dim=-1)
        return Routing(logits, expert_ids=chosen.indices, expert_weights=chosen.values.softmax(dim=-1))
