"""The experts of one layer: small networks with stacked weights, dropless.

``forward`` sorts the tokens by expert and multiplies group by group; ``reference`` is the same function as a loop that
can be read at a glance. Both add a token's experts in the order in which the router named them, never by atomics.

Letters: N tokens, C channels, E experts, K experts per token, F expert size, M rows of the sorted layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chance import LayerChance
from model.config import ModelConfig
from model.router import Router, Routing

# On the CPU a row of a matrix product has the same bits for every row count that is a multiple of 4, so each expert's
# group is padded to one: what a token gets must not depend on how many others chose its expert.
ROW_MULTIPLE = 4


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# What becomes of an expert's inner products, and how many matrices make them.
ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "swiglu": (2, _swiglu),
    "relu": (1, F.relu),
    "gelu": (1, F.gelu),
}


class Experts(nn.Module):
    """E experts: down(silu(gate(x)) * up(x)), which is SwiGLU (Shazeer 2020), or down(relu(up(x))), or with gelu."""

    def __init__(self, channels: int, num_experts: int, expert_size: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.row_multiple = ROW_MULTIPLE
        num_matrices, self._activate = ACTIVATIONS[activation]
        self.gate_up = nn.Parameter(torch.randn(num_experts, num_matrices, expert_size, channels) * channels**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, channels, expert_size) * expert_size**-0.5)

    def forward(self, x: Tensor, routing: Routing, chance: LayerChance | None = None) -> Tensor:
        """x (N, C) -> (N, C), each row the weighted sum of its K experts' outputs."""
        experts_per_token = routing.expert_ids.shape[-1]
        row_of, group_ends, num_rows = padded_layout(routing.expert_ids.flatten(), self.num_experts, self.row_multiple)
        token_of = row_of.new_zeros(num_rows)  # rows of padding compute token 0 once more; nobody reads them
        token_of[row_of] = torch.arange(row_of.numel(), device=x.device) // experts_per_token
        rows = cast("Any", _Dispatch).apply(x, token_of, row_of)  # torch leaves apply without types
        hidden = self._activate(_multiply(rows, self.gate_up.flatten(1, 2), group_ends))  # (M, F)
        if chance is not None:
            hidden = chance.drop_hidden(hidden, row_of)
        outputs = cast("Any", _Collect).apply(_multiply(hidden, self.down, group_ends), row_of)
        outputs = outputs.unflatten(0, (-1, experts_per_token))  # (N, K, C)
        combined: Tensor = (outputs * routing.expert_weights.unsqueeze(-1).to(outputs.dtype)).sum(dim=1)
        return combined

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """What ``forward`` computes, one expert after the other."""
        outputs = x.new_zeros(*routing.expert_ids.shape, x.shape[-1])  # (N, K, C)
        for expert in range(self.num_experts):
            chose_it = routing.expert_ids == expert  # (N, K)
            tokens, _ = chose_it.nonzero(as_tuple=True)
            inner = torch.cat([x[tokens] @ matrix.T for matrix in self.gate_up[expert]], dim=-1)
            outputs[chose_it] = self._activate(inner) @ self.down[expert].T
        return (outputs * routing.expert_weights.unsqueeze(-1)).sum(dim=1)


class _Dispatch(torch.autograd.Function):
    """x[token_of]: tokens (N, C) -> rows (M, C). Indexing alone would add up the gradients one by one, on one core."""

    @staticmethod
    def forward(x: Tensor, token_of: Tensor, row_of: Tensor) -> Tensor:
        return x[token_of]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, _, row_of = inputs
        ctx.save_for_backward(row_of)
        ctx.num_tokens = len(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_of,) = ctx.saved_tensors
        return gradients[0][row_of].unflatten(0, (ctx.num_tokens, -1)).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """rows[row_of]: rows (M, C) -> assignments (A, C), each row read once or, where it is padding, never."""

    @staticmethod
    def forward(rows: Tensor, row_of: Tensor) -> Tensor:
        return rows[row_of]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows, row_of = inputs
        ctx.save_for_backward(row_of)
        ctx.num_rows = len(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (row_of,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.num_rows, gradients[0].shape[1]).index_copy_(0, row_of, gradients[0]), None


def _multiply(rows: Tensor, matrices: Tensor, group_ends: Tensor) -> Tensor:
    """Each group of rows (M, I) with its own of the matrices (E, O, I) -> (M, O)."""
    product: Tensor = torch._grouped_mm(rows, matrices.transpose(1, 2), offs=group_ends)
    return product


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
    """A router and its experts: ``y, routing = moe(x)``. The options are ModelConfig's fields of the same names.

    Raises UnsupportedConfig for sizes and options that ModelConfig would refuse, where channels is hidden_size.
    """

    def __init__(
        self,
        channels: int,
        num_experts: int,
        experts_per_token: int,
        expert_size: int,
        *,
        activation: str = "swiglu",
        num_groups: int = 1,
        groups_per_token: int = 1,
        gates_over: str = "chosen",
    ) -> None:
        super().__init__()
        chosen: dict[str, Any] = {"num_experts": num_experts, "experts_per_token": experts_per_token}
        chosen |= {"num_groups": num_groups, "groups_per_token": groups_per_token, "gates_over": gates_over}
        sizes: dict[str, Any] = {"hidden_size": channels, "expert_size": expert_size, "activation": activation}
        ModelConfig(vocab_size=1, num_layers=1, **sizes, **chosen)
        self.router = Router(channels, **chosen)
        self.experts = Experts(channels, num_experts, expert_size, activation)

    def forward(
        self, x: Tensor, disabled: Tensor | None = None, chance: LayerChance | None = None
    ) -> tuple[Tensor, Routing]:
        """x (..., C) -> (..., C) and the routing of its N tokens, one at least, in order. disabled, chance: as the
        router takes them.

        Whom a full expert turns away is not in the routing: it says what the router wanted.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens, disabled, chance)
        carried_out = routing if chance is None else chance.within_capacity(routing)
        return self.experts(tokens, carried_out, chance).view_as(x), routing
