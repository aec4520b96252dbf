"""Attention over the last ``context_length`` positions: normed queries and keys, rotary positions, grouped KV heads.

Where keys and values come from is somebody else's business: a layer hands its queries, keys and values to an
``Attend``, which is the plain window below or a view of the ring cache.

Letters: B batch, T time, C channels, H query heads, G key/value heads, D head size, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.norm import RMSNorm

LONGEST_UNFUSED = 512
"""Up to here a CPU trains faster when scores are written out; then it is the fused kernel, which also spares memory."""

ROWS_OF_A_BLOCK = 64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries (B, H, T, D), keys (B, G, T, D), values (B, G, T, D)) -> (B, H, T, D)"""


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the rotation angles of some positions; each (B or 1, 1, T, D), float32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float) -> Rotary:
        """Angles are computed in float64, so that positions far out stay exact. positions (B or 1, T) of integers."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
        angles = positions[:, None, :, None].double() * theta**-exponents  # (B, 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        return cls(cos=angles.cos().float(), sin=angles.sin().float())

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of x (B, H, T, D) with the head split in halves (Su et al. 2021, in GPT-NeoX's layout)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def window_mask(query_positions: Tensor, key_positions: Tensor, context_length: int) -> Tensor:
    """Who may look at whom: the last context_length positions, oneself included, never a negative position.

    query_positions (T,), key_positions (S,) -> (T, S) of bool, True where attention is allowed.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    return (distance >= 0) & (distance < context_length) & (key_positions[None, :] >= 0)


def attend_in_window(context_length: int, length: int, device: torch.device) -> Attend:
    """Attention of a whole text with itself, uncached: what training and the reference use."""
    if length <= min(context_length, LONGEST_UNFUSED) and device.type == "cpu" and torch.is_grad_enabled():
        return _attend_unfused
    if length <= context_length:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    positions = torch.arange(length, device=device)
    mask = window_mask(positions, positions, context_length)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _attend_unfused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention, block after block of queries with the keys that the block may see: of 256 positions products of
    5/8 of the whole square."""
    length, size = queries.shape[2], ROWS_OF_A_BLOCK
    grouped = (queries * queries.shape[-1] ** -0.5).unflatten(1, (keys.shape[1], -1))  # (B, G, H/G, T, D)
    later = torch.full((size, size), -torch.inf).triu(1)
    attended = []
    for start in range(0, length, size):
        end = min(start + size, length)
        shape = (grouped.shape[2], end - start)
        scores = (grouped[:, :, :, start:end].flatten(2, 3) @ keys[:, :, :end].mT).unflatten(2, shape)
        weights = scores.add_(F.pad(later[: end - start, : end - start], (start, 0))).softmax(dim=-1).flatten(2, 3)
        attended.append((weights @ values[:, :, :end]).unflatten(2, shape))
    return torch.cat(attended, dim=3).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention without biases; queries and keys are RMS-normed per head before rotation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        channels = config.hidden_size
        self.query = nn.Linear(channels, config.num_heads * config.head_dim, bias=False)
        self.key = nn.Linear(channels, config.num_kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(channels, config.num_kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, channels, bias=False)
        self.query_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        queries = rotary.rotate(self.query_norm(self._heads(self.query(x))))
        keys = rotary.rotate(self.key_norm(self._heads(self.key(x))))
        attended = attend(queries, keys, self._heads(self.value(x)))  # (B, H, T, D)
        update: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return update

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, D)
        return heads.transpose(1, 2)
