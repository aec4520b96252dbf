"""What training adds to the loss so that experts share the work.

Letters: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.router import Routing


def switch_loss(routing: Routing) -> Tensor:
    """E x sum over experts of (share of assignments) x (mean probability); 1 at balance, E at collapse.

    Switch Transformer (Fedus et al. 2021), eq. 4-6, with the share over all K choices. Gradient flows through the
    probabilities alone. logits (N, E) -> scalar.
    """
    num_experts = routing.logits.shape[-1]
    chosen = torch.bincount(routing.expert_ids.flatten(), minlength=num_experts)
    share = chosen / routing.expert_ids.numel()
    return num_experts * (share * routing.logits.softmax(dim=-1).mean(dim=0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log of the router's partition function, which keeps its logits small.

    ST-MoE (Zoph et al. 2022), eq. 5. logits (N, E) -> scalar.
    """
    return routing.logits.logsumexp(dim=-1).square().mean()
