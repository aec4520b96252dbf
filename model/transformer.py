"""The whole network: embedding, layers of attention and mixture of experts, head. Knows no files and no sampling.

Letters: B batch, T time, C channels, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import Attend, Attention, Rotary, attend_in_window
from model.chance import Chance, LayerChance
from model.config import ModelConfig
from model.experts import SparseMoE
from model.norm import RMSNorm
from model.router import Routing

AttendIn = Callable[[int], Attend]
"""layer -> how that layer attends"""


class Layer(nn.Module):
    """Pre-norm attention and pre-norm mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = SparseMoE(
            config.hidden_size,
            config.num_experts,
            config.experts_per_token,
            config.expert_size,
            activation=config.activation,
            num_groups=config.num_groups,
            groups_per_token=config.groups_per_token,
            gates_over=config.gates_over,
        )

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attend: Attend,
        disabled: Tensor | None = None,
        chance: LayerChance | None = None,
    ) -> tuple[Tensor, Routing]:
        """x (B, T, C) -> (B, T, C) and the routing of its B * T tokens. disabled (B * T or 1, E)"""
        attended = self.attention(self.attention_norm(x), rotary, attend)
        x = x + (attended if chance is None else chance.drop_update(attended, "attention"))
        update, routing = self.moe(self.moe_norm(x), disabled, chance)
        return x + (update if chance is None else chance.drop_update(update, "moe")), routing


class Transformer(nn.Module):
    """A decoder-only sparse mixture-of-experts language model, as ``ModelConfig`` describes it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = cast("Sequence[Layer]", nn.ModuleList(Layer(config) for _ in range(config.num_layers)))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def pad_rows_to(self, multiple: int) -> None:
        """Pad every expert's group of rows to a multiple of this; 4 unless told."""
        for layer in self.layers:
            layer.moe.experts.row_multiple = multiple

    def forward(
        self, ids: Tensor, disabled: Tensor | None = None, chance: Chance | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """A whole text at once, uncached. ids (B, T) -> logits (B, T, V) and the routing of each layer.

        disabled (1, L, E) of bool: experts to do without. chance is training's alone; nothing is random without it.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        attend = attend_in_window(self.config.context_length, ids.shape[1], ids.device)
        hidden, routings = self.hidden(ids, positions[None], lambda layer: attend, disabled, chance)
        return self.head(hidden), routings

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attend_in: AttendIn,
        disabled: Tensor | None = None,
        chance: Chance | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """The final normed states of some tokens: ids and positions (B or 1, T) -> (B, T, C), routing per layer.

        disabled (B * T or 1, L, E) of bool: experts that a token must do without.
        """
        x = self.embedding(ids)
        rotary = Rotary.at(positions, self.config.head_dim, self.config.rope_theta)
        routings = []
        for index, layer in enumerate(self.layers):
            gone = None if disabled is None else disabled[:, index]
            x, routing = layer(x, rotary, attend_in(index), gone, None if chance is None else chance.layer(index))
            routings.append(routing)
        return self.norm(x), routings
