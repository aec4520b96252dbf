"""What training descends: the cross entropy, and what keeps the experts busy and the router's logits small.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.router import Routing
from training.balance import importance_loss, load_loss, switch_loss, z_loss
from training.config import TrainingConfig

TERMS = {
    "balance_weight": switch_loss,
    "z_weight": z_loss,
    "importance_weight": importance_loss,
    "load_weight": load_loss,
}


def objective(
    logits: Tensor,
    targets: Tensor,
    routings: Sequence[Routing],
    config: TrainingConfig,
) -> tuple[Tensor, Tensor]:
    """The loss to descend, and its cross entropy in nats per token: logits (B, T, V), targets (B, T) -> two scalars.

    Where processes share the batch, logits and targets are this one's and the routings are everybody's.
    """
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = cross_entropy
    for name, term in TERMS.items():
        if weight := getattr(config, name):
            # Summed over the layers, not averaged: averaging lets the last layer drift out of balance.
            loss = loss + weight * torch.stack([term(routing) for routing in routings]).sum()
    return loss, cross_entropy
