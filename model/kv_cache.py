"""Keys and values of the last ``context_length`` positions of every slot, as a ring: a stream may run for ever.

Position p lies at ring index p modulo R. The cache hands a layer an ``Attend`` for the step at hand and knows nothing
of who the slots belong to.

Letters: L layers, S slots, G key/value heads, R ring length (context_length), D head size, B rows, H query heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attend, window_mask
from model.config import ModelConfig


class KVCache:
    """The ring buffers of all slots: keys and values (L, S, G, R, D), float32."""

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        shape = (config.num_layers, num_slots, config.num_kv_heads, config.context_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = config.context_length

    @staticmethod
    def bytes_per_slot(config: ModelConfig) -> int:
        return 2 * 4 * config.num_layers * config.num_kv_heads * config.context_length * config.head_dim

    def clear(self, slot: int | slice) -> None:
        """Forget a slot, or several. A NaN would leak into the slot's next tenant, because a mask does not hide one."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0

    def decode(self, slots: Tensor, positions: Tensor) -> CacheDecode:
        """One new token for each of B rows. slots (B,), positions (B,)."""
        return CacheDecode(self, slots, positions)

    def prefill(self, slot: int, start: int, num_tokens: int, num_rows: int) -> CachePrefill:
        """A chunk of one sequence: num_tokens real ones at positions from start on, padded to num_rows."""
        return CachePrefill(self, slot, start, num_tokens, num_rows)


class CacheDecode:
    """Writes each row's key and value into its ring, then attends over the whole ring under a mask.

    The number of keys never changes and the product is a plain batched matmul, so a row's bits depend neither on its
    mates nor on how far it has come.
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self._cache = cache
        self._slots = slots
        self._indices = positions % cache.length
        ring = torch.arange(cache.length, device=positions.device)
        self._hidden = (ring[None, :] > positions[:, None])[:, None, None, :]  # (B, 1, 1, R): not written yet

    def layer(self, layer: int) -> Attend:
        keys, values = self._cache.keys[layer], self._cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[self._slots, :, self._indices] = k[:, :, 0]
            values[self._slots, :, self._indices] = v[:, :, 0]
            grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, G, H/G, D)
            scores = grouped @ keys[self._slots].transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, G, H/G, R)
            weights = scores.masked_fill(self._hidden, -torch.inf).softmax(dim=-1)
            attended: Tensor = weights @ values[self._slots]
            return attended.flatten(1, 2).unsqueeze(2)

        return attend


class CachePrefill:
    """Attends to the ring and to the chunk side by side, and writes the chunk into the ring afterwards."""

    def __init__(self, cache: KVCache, slot: int, start: int, num_tokens: int, num_rows: int) -> None:
        self._cache = cache
        self._slot = slot
        device = cache.keys.device
        chunk = torch.arange(start, start + num_rows, device=device)
        ring = torch.arange(cache.length, device=device)
        # The position that each ring index holds; negative if none.
        held = start - 1 - (start - 1 - ring) % cache.length
        self._mask = window_mask(chunk, torch.cat((held, chunk)), cache.length)
        first = max(0, num_tokens - cache.length)  # of a chunk longer than the ring only the end stays
        self._written = slice(first, num_tokens)
        self._indices = chunk[self._written] % cache.length

    def layer(self, layer: int) -> Attend:
        ring_keys, ring_values = self._cache.keys[layer, self._slot], self._cache.values[layer, self._slot]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = torch.cat((ring_keys[None], k), dim=2)
            values = torch.cat((ring_values[None], v), dim=2)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask, enable_gqa=True)
            ring_keys[:, self._indices] = k[0, :, self._written]
            ring_values[:, self._indices] = v[0, :, self._written]
            return attended

        return attend
