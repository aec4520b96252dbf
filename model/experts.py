"""The experts of one layer: SwiGLU networks with stacked weights, dropless.

``forward`` sorts the tokens by expert and multiplies group by group; ``reference`` is the same function as a loop that
can be read at a glance. Both add a token's experts in the order in which the router named them, never by atomics.

Letters: N tokens, C channels, E experts, K experts per token, F expert size, M rows of the sorted layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.router import Router, Routing

# On the CPU a row of a matrix product has the same bits for every row count that is a multiple of 4, so each expert's
# group is padded to one: what a token gets must not depend on how many others chose its expert.
ROW_MULTIPLE = 4


class Experts(nn.Module):
    """E SwiGLU experts (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, channels: int, num_experts: int, expert_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.row_multiple = ROW_MULTIPLE
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, expert_size, channels))
        self.down = nn.Parameter(torch.empty(num_experts, channels, expert_size))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (N, C) -> (N, C), each row the weighted sum of its K experts' outputs."""
        experts_per_token = routing.expert_ids.shape[-1]
        row_of, group_ends, num_rows = padded_layout(routing.expert_ids.flatten(), self.num_experts, self.row_multiple)
        token_of = row_of.new_zeros(num_rows)  # rows of padding compute token 0 once more; nobody reads them
        token_of[row_of] = torch.arange(row_of.numel(), device=x.device) // experts_per_token
        outputs = self._multiply(x[token_of], group_ends)[row_of].unflatten(0, (-1, experts_per_token))  # (N, K, C)
        combined: Tensor = (outputs * routing.expert_weights.unsqueeze(-1).to(outputs.dtype)).sum(dim=1)
        return combined

    def _multiply(self, rows: Tensor, group_ends: Tensor) -> Tensor:
        """Each group of rows (M, C) through its own expert -> (M, C)."""
        gate_up = torch._grouped_mm(rows, self.gate_up.flatten(1, 2).transpose(1, 2), offs=group_ends)
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=group_ends)
        return product

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """What ``forward`` computes, one expert after the other."""
        outputs = x.new_zeros(*routing.expert_ids.shape, x.shape[-1])  # (N, K, C)
        for expert in range(self.num_experts):
            chose_it = routing.expert_ids == expert  # (N, K)
            tokens, _ = chose_it.nonzero(as_tuple=True)
            gate, up = (x[tokens] @ matrix.T for matrix in self.gate_up[expert])
            outputs[chose_it] = (F.silu(gate) * up) @ self.down[expert].T
        return (outputs * routing.expert_weights.unsqueeze(-1)).sum(dim=1)


def padded_layout(expert_ids: Tensor, num_experts: int, row_multiple: int = ROW_MULTIPLE) -> tuple[Tensor, Tensor, int]:
    """Where each assignment goes when assignments are sorted by expert and every group is padded to row_multiple rows.

    expert_ids (A,) -> row of each assignment (A,), end of each expert's group (E,) int32, number of rows. No shape
    depends on the values, so nothing waits for the device. The last group takes the rows that are left over: a row of
    no group would carry undefined gradients.
    """
    num_rows = expert_ids.numel() + (row_multiple - 1) * num_experts
    num_rows += -num_rows % row_multiple
    order = expert_ids.argsort(stable=True)
    counts = expert_ids.new_zeros(num_experts).scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
    padded = (counts + row_multiple - 1) // row_multiple * row_multiple
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # how far padding has moved each expert's group
    rows = torch.empty_like(expert_ids)
    rows[order] = torch.arange(expert_ids.numel(), device=expert_ids.device) + shift[expert_ids[order]]
    ends[-1] = num_rows
    return rows, ends.to(torch.int32), num_rows


class SparseMoE(nn.Module):
    """A router and its experts: ``y, routing = moe(x)``."""

    def __init__(self, channels: int, num_experts: int, experts_per_token: int, expert_size: int) -> None:
        super().__init__()
        self.router = Router(channels, num_experts, experts_per_token)
        self.experts = Experts(channels, num_experts, expert_size)

    def forward(self, x: Tensor, disabled: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (..., C) -> (..., C) and the routing of its N tokens in order. disabled: as the router takes it."""
        tokens = x.flatten(0, -2)
        routing = self.router(tokens, disabled)
        return self.experts(tokens, routing).view_as(x), routing
