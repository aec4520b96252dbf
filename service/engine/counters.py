"""The one count of what the experts did: per slot while a sequence runs, in the totals once its slot is given back.

Letters: S slots, P phases (prefill, decode), L layers, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Routing
from model.routing import fixed_point
from service.engine.sequence import Phase


class ExpertCounters:
    """Routed tokens (S, P, L, E) and gate weight in fixed point (S, L, E), int64, on the model's device.

    A runner that counts by itself adds to ``tokens`` and ``weight`` of the slots that it feeds.
    """

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        layers, experts = config.num_layers, config.num_experts
        # Padding rows are routed too; crediting them to a slot of nobody's keeps them out of every sum.
        self.tokens = torch.zeros(num_slots + 1, len(Phase), layers, experts, dtype=torch.int64, device=device)
        self.weight = torch.zeros(num_slots + 1, layers, experts, dtype=torch.int64, device=device)
        self._past_tokens = torch.zeros_like(self.tokens[0])
        self._past_weight = torch.zeros_like(self.weight[0])

    def add(self, phase: Phase, slots: Tensor, routings: Sequence[Routing]) -> None:
        """Count one step's routing: slots (N,), whose each token was fed for, and one Routing of N tokens per layer."""
        ids = torch.stack([routing.expert_ids for routing in routings], dim=1)  # (N, L, K)
        self._count(phase, slots, ids, torch.stack([routing.expert_weights for routing in routings], dim=1), 1)

    def take_back(self, phase: Phase, slot: int, expert_ids: Tensor, expert_weights: Tensor) -> None:
        """Uncount N tokens that turned out to be fed for nothing, both (N, L, K)."""
        self._count(phase, torch.full((len(expert_ids),), slot), expert_ids, expert_weights, -1)

    def _count(self, phase: Phase, slots: Tensor, ids: Tensor, weights: Tensor, sign: int) -> None:
        where = (
            slots[:, None, None].expand_as(ids),
            torch.arange(ids.shape[1], device=ids.device)[None, :, None].expand_as(ids),
        )
        tokens = torch.full_like(ids, sign)
        self.tokens[:, list(Phase).index(phase)].index_put_((*where, ids), tokens, accumulate=True)
        self.weight.index_put_((*where, ids), sign * fixed_point(weights), accumulate=True)

    def take(self, slot: int | None) -> Tensor:
        """Move a slot's counts to the totals; its routed tokens over both phases, (L, E). No slot has none."""
        if slot is None:
            return torch.zeros_like(self._past_weight)
        tokens = self.tokens[slot].clone()
        self._past_tokens += tokens
        self._past_weight += self.weight[slot]
        self.tokens[slot] = 0
        self.weight[slot] = 0
        return tokens.sum(dim=0)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Routed tokens (P, L, E) and gate weight in fixed point (L, E) since the start, running slots included."""
        return self._past_tokens + self.tokens[:-1].sum(dim=0), self._past_weight + self.weight[:-1].sum(dim=0)

    def reset(self) -> None:
        """Forget everything, after a warm-up."""
        for tensor in (self.tokens, self.weight, self._past_tokens, self._past_weight):
            tensor.zero_()
