"""What training adds to the loss so that experts share the work.

Each is a function of one layer's routing of the whole batch: where several processes share it, their routings are
gathered first.

Letters: N tokens, E experts, K experts per token, G groups of S = E / G experts, J groups per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.router import Routing


def switch_loss(routing: Routing) -> Tensor:
    """E x sum over experts of (share of assignments) x (mean probability); 1 at balance, E / K at collapse.

    Switch Transformer (Fedus et al. 2021), eq. 4-6, with the share over all K choices. Gradient flows through the
    probabilities alone. logits (N, E) -> scalar.
    """
    num_experts = routing.logits.shape[-1]
    chosen = torch.bincount(routing.expert_ids.flatten(), minlength=num_experts)
    share = chosen / chosen.sum()
    return num_experts * (share * routing.logits.softmax(dim=-1).mean(dim=0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log of the router's partition function, which keeps its logits small.

    ST-MoE (Zoph et al. 2022), eq. 5. With groups it keeps those of the first level small. logits (N, E) -> scalar.
    """
    return routing.logits.logsumexp(dim=-1).square().mean()


def importance_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the gate mass per expert (Shazeer et al. 2017, eq. 6-7) -> scalar."""
    return squared_variation(importance(routing))


def load_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the expected load per expert (Shazeer et al. 2017, eq. 10-11) -> scalar."""
    return squared_variation(load(routing))


def importance(routing: Routing) -> Tensor:
    """The sum of every expert's gates over the batch: (E,)."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.expert_ids, routing.expert_weights).sum(dim=0)


def load(routing: Routing) -> Tensor:
    """How many tokens of the batch each expert would get on average if its own noise were drawn once more: (E,).

    The sum of P(x, i) over tokens (Shazeer et al. 2017, appendix A); on two levels the load of the group times the mean
    probability among the tokens that came to it (appendix B).
    """
    noise, num_experts = routing.noise, routing.logits.shape[-1]
    assert noise is not None, "load is a probability over noise"
    added, std = noise.added[:, :num_experts], noise.std[:, :num_experts]
    if routing.group_logits is None or routing.group_ids is None:
        chosen = chance_of_choice(routing.logits, added, std, routing.expert_ids.shape[-1])
        return chosen.sum(dim=0)
    num_groups, num_chosen = routing.group_logits.shape[-1], routing.group_ids.shape[-1]
    groups = chance_of_choice(
        routing.group_logits, noise.added[:, num_experts:], noise.std[:, num_experts:], num_chosen
    )
    logits, added, std = (each.unflatten(-1, (num_groups, -1)) for each in (routing.logits, added, std))
    share = routing.expert_ids.shape[-1] // num_chosen
    experts = chance_of_choice(logits, added, std, share)  # (N, G, S)
    came = torch.zeros_like(routing.group_logits).scatter(-1, routing.group_ids, 1.0)  # (N, G)
    inside = (experts * came.unsqueeze(-1)).sum(dim=0) / came.sum(dim=0).clamp_min(1)[:, None]
    return (groups.sum(dim=0).unsqueeze(-1) * inside).flatten()


def chance_of_choice(noisy: Tensor, added: Tensor, std: Tensor, k: int) -> Tensor:
    """P(x, i): that i is among the k best when its noise is drawn anew and the others' stays.

    Shazeer et al. 2017, eq. 8-9: Phi((clean_i - kth best of the others) / std_i). All (..., E), noisy with what was
    added -> (..., E).
    """
    if k >= noisy.shape[-1]:
        return torch.ones_like(noisy)
    best = noisy.topk(k + 1, dim=-1).values
    kth, after = best[..., k - 1 : k], best[..., k:]
    to_beat = torch.where(noisy > after, after, kth)
    # The deviation is a softplus, which may round to zero.
    probability: Tensor = torch.special.ndtr((noisy - added - to_beat) / std.clamp_min(1e-6))
    return probability


def squared_variation(amounts: Tensor) -> Tensor:
    """Variance over squared mean: 0 when all are equal. (E,) -> scalar."""
    mean = amounts.mean()
    return (amounts - mean).square().mean() / mean.square().clamp_min(1e-12)
