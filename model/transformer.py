"""The whole network: embedding, layers of attention and mixture of experts, head. Knows no files and no sampling.

Letters: B batch, T time, C channels, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import Attend, Attention, Rotary, attend_in_window
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
        self.moe = SparseMoE(config.hidden_size, config.num_experts, config.experts_per_token, config.expert_size)

    def forward(
        self, x: Tensor, rotary: Rotary, attend: Attend, disabled: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """x (B, T, C) -> (B, T, C) and the routing of its B * T tokens. disabled (B * T or 1, E)"""
        x = x + self.attention(self.attention_norm(x), rotary, attend)
        update, routing = self.moe(self.moe_norm(x), disabled)
        return x + update, routing


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

    def forward(self, ids: Tensor, disabled: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """A whole text at once, uncached. ids (B, T) -> logits (B, T, V) and the routing of each layer.

        disabled (1, L, E) of bool: experts to do without.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        attend = attend_in_window(self.config.context_length, ids.shape[1], ids.device)
        hidden, routings = self.hidden(ids, positions[None], lambda layer: attend, disabled)
        return self.head(hidden), routings

    def hidden(
        self, ids: Tensor, positions: Tensor, attend_in: AttendIn, disabled: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """The final normed states of some tokens: ids and positions (B or 1, T) -> (B, T, C), routing per layer.

        disabled (B * T or 1, L, E) of bool: experts that a token must do without.
        """
        x = self.embedding(ids)
        rotary = Rotary.at(positions, self.config.head_dim, self.config.rope_theta)
        routings = []
        for index, layer in enumerate(self.layers):
            x, routing = layer(x, rotary, attend_in(index), None if disabled is None else disabled[:, index])
            routings.append(routing)
        return self.norm(x), routings
