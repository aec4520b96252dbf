"""Chooses the experts of every token, and says what it decided. Knows nothing of what the experts compute.

Letters: N tokens, C channels, E experts, K experts per token, G groups of S = E / G experts, J groups per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chance import LayerChance


@dataclass(frozen=True)
class Noise:
    """What training adds to the logits, and its standard deviation; each (N, E + G), or (N, E) without groups."""

    added: Tensor
    std: Tensor


@dataclass(frozen=True)
class Routing:
    """One layer's decision for N tokens: logits (N, E), expert_ids and expert_weights (N, K); weights sum to 1.

    With gates over all experts the weights sum to less. With groups, expert ids count through all groups, the softmax
    of the logits is P(group) x P(expert in its group), and group_logits (N, G) and group_ids (N, J) are the first
    level's. noise is what training added to the logits.
    """

    logits: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    group_logits: Tensor | None = None
    group_ids: Tensor | None = None
    noise: Noise | None = None


class Router(nn.Module):
    """Softmax over the top-k logits (Shazeer et al. 2017, eq. 3-5), on one level or on two (appendix B), in float32.

    Without the chance that training hands it there is no noise: a token's experts depend on its own state alone.
    """

    def __init__(
        self,
        channels: int,
        num_experts: int,
        experts_per_token: int,
        *,
        num_groups: int = 1,
        groups_per_token: int = 1,
        gates_over: str = "chosen",
    ) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.num_groups = num_groups
        self.groups_per_token = groups_per_token
        self.gates_over = gates_over
        self.weight = nn.Parameter(torch.randn(num_experts, channels) * channels**-0.5)
        if num_groups > 1:
            self.group_weight = nn.Parameter(torch.randn(num_groups, channels) * channels**-0.5)

    def forward(self, x: Tensor, disabled: Tensor | None = None, chance: LayerChance | None = None) -> Routing:
        """x (N, C) -> Routing. disabled (N or 1, E) of bool: experts that a token must do without.

        A group with too few experts left to give a token its share is passed over as a whole.
        """
        noise = None if chance is None else chance.router_noise(x)
        x = (x if chance is None else chance.jitter(x)).float()
        logits = F.linear(x, self.weight.float())
        if noise is not None:
            logits = logits + noise.added[:, : logits.shape[-1]]
        if self.num_groups > 1:
            return self._on_two_levels(x, logits, disabled, noise)
        if disabled is not None:
            logits = logits.masked_fill(disabled, -torch.inf)
        chosen = logits.topk(self.experts_per_token, dim=-1)
        weights = self._over(logits, chosen.indices, chosen.values.softmax(dim=-1))
        return Routing(logits, chosen.indices, weights, noise=noise)

    def _on_two_levels(self, x: Tensor, logits: Tensor, disabled: Tensor | None, noise: Noise | None) -> Routing:
        """A gate for the groups, and within every chosen group a gate for its experts; the weight is their product."""
        group_logits = F.linear(x, self.group_weight.float())  # (N, G)
        if noise is not None:
            group_logits = group_logits + noise.added[:, logits.shape[-1] :]
        share = self.experts_per_token // self.groups_per_token
        inside = logits.unflatten(-1, (self.num_groups, -1))  # (N, G, S)
        if disabled is not None:
            gone = disabled.unflatten(-1, (self.num_groups, -1))
            passed_over = (~gone).sum(dim=-1) < share
            group_logits = group_logits.masked_fill(passed_over, -torch.inf)
            # Of a group that is passed over all may be gone, and a softmax over none is not a number.
            inside = inside.masked_fill(gone & ~passed_over.unsqueeze(-1), -torch.inf)
        inside = inside.log_softmax(dim=-1)
        groups = group_logits.topk(self.groups_per_token, dim=-1)  # (N, J)
        size = inside.shape[-1]
        offered = inside.gather(1, groups.indices.unsqueeze(-1).expand(-1, -1, size))  # (N, J, S)
        chosen = offered.topk(share, dim=-1)  # (N, J, K / J)
        ids = (groups.indices.unsqueeze(-1) * size + chosen.indices).flatten(1)
        product = groups.values.softmax(dim=-1).unsqueeze(-1) * chosen.values.softmax(dim=-1)
        joint = (group_logits.unsqueeze(-1) + inside).flatten(1)  # (N, E)
        weights = self._over(joint, ids, product.flatten(1))
        return Routing(joint, ids, weights, group_logits, groups.indices, noise)

    def _over(self, logits: Tensor, ids: Tensor, over_chosen: Tensor) -> Tensor:
        """The gate weights (N, K), as the softmax is over the chosen experts or over all (Switch, eq. 1)."""
        return over_chosen if self.gates_over == "chosen" else logits.softmax(dim=-1).gather(-1, ids)
