"""Rotation, windows and the ring: cached reading computes what uncached reading computes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.attention import Rotary, attend_in_window, window_mask
from model.kv_cache import KVCache
from model.transformer import Transformer
from tests.checkpoints import tiny_model

LENGTH = 4 * 32  # four times the context


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model().requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 65, (LENGTH,), generator=torch.Generator().manual_seed(1))


def test_rotation_turns_each_pair_by_its_angle() -> None:
    position, theta, head_dim = 5, 10_000.0, 4
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    rotated = Rotary.at(torch.tensor([[position]]), head_dim, theta).rotate(x).flatten()
    for pair in range(2):  # element i turns with element i + head_dim / 2
        angle = position * theta ** (-2 * pair / head_dim)
        a, b = x.flatten()[pair].item(), x.flatten()[pair + 2].item()
        assert rotated[pair].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
        assert rotated[pair + 2].item() == pytest.approx(a * math.sin(angle) + b * math.cos(angle), abs=1e-6)


def test_angles_stay_exact_far_out() -> None:
    far = 1_000_000_007
    rotary = Rotary.at(torch.tensor([[far]]), 32, 10_000.0)
    assert rotary.cos[0, 0, 0, 0].item() == pytest.approx(math.cos(far), abs=1e-7)


def test_the_window_holds_context_length_positions_and_nothing_ahead() -> None:
    mask = window_mask(torch.arange(10), torch.arange(10), context_length=3)
    assert [[key for key in range(10) if mask[query, key]] for query in (0, 1, 5)] == [[0], [0, 1], [3, 4, 5]]
    assert not window_mask(torch.arange(3), torch.tensor([-1, -2]), context_length=9).any()


@torch.inference_mode()
def test_nothing_before_the_receptive_field_reaches_a_position(model: Transformer, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[0] = (changed[0] + 1) % 65
    reach = model.config.num_layers * (model.config.context_length - 1)  # each layer looks that much further back
    before, after = model(ids[None])[0][0], model(changed[None])[0][0]
    assert torch.equal(before[reach + 1 :], after[reach + 1 :])
    assert not torch.allclose(before[reach - 40], after[reach - 40], atol=0, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 32, 50])
@torch.inference_mode()
def test_reading_in_chunks_through_the_ring_equals_reading_at_once(
    model: Transformer, ids: torch.Tensor, chunk: int
) -> None:
    cache = KVCache(model.config, num_slots=2, device=model.device)
    pieces = []
    for start in range(0, LENGTH, chunk):
        x = ids[start : start + chunk]
        view = cache.prefill(slot=1, start=start, num_tokens=len(x), num_rows=len(x))
        pieces.append(model.hidden(x[None], torch.arange(start, start + len(x))[None], view.layer)[0])
    whole = model.head(torch.cat(pieces, dim=1))
    torch.testing.assert_close(whole, model(ids[None])[0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_padding_of_a_chunk_changes_nothing(model: Transformer, ids: torch.Tensor) -> None:
    bare, padded = (KVCache(model.config, num_slots=1, device=model.device) for _ in range(2))
    x = ids[:9]
    view = bare.prefill(slot=0, start=0, num_tokens=9, num_rows=9)
    expected, _ = model.hidden(x[None], torch.arange(9)[None], view.layer)
    x = torch.cat((x, torch.zeros(7, dtype=torch.int64)))
    view = padded.prefill(slot=0, start=0, num_tokens=9, num_rows=16)
    hidden, _ = model.hidden(x[None], torch.arange(16)[None], view.layer)
    torch.testing.assert_close(hidden[:, :9], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(padded.keys[:, :, :, 9:], torch.zeros_like(padded.keys[:, :, :, 9:])), "padding was written"


@torch.inference_mode()
def test_decoding_rows_at_different_positions_equals_reading_each_at_once(
    model: Transformer, ids: torch.Tensor
) -> None:
    cache = KVCache(model.config, num_slots=3, device=model.device)
    texts = [ids, ids.flip(0), ids.roll(11)]
    late = 40  # the third row begins when the others are here
    seen: list[list[torch.Tensor]] = [[], [], []]
    for step in range(LENGTH):
        rows = [0, 1, 2] if step >= late else [0, 1]
        at = torch.tensor([step, step, step - late][: len(rows)])
        x = torch.stack([texts[row][position] for row, position in zip(rows, at.tolist(), strict=True)])
        view = cache.decode(torch.tensor(rows), at)
        hidden, _ = model.hidden(x[:, None], at[:, None], view.layer)
        for row in rows:
            seen[row].append(model.head(hidden[row, 0]))
    for text, logits in zip(texts, seen, strict=True):
        expected = model(text[None, : len(logits)])[0][0]
        torch.testing.assert_close(torch.stack(logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 64, 100, 256])
def test_attention_that_trains_equals_the_fused_one_with_all_gradients(length: int) -> None:
    torch.manual_seed(0)
    parts = queries, keys, values = [torch.randn(2, heads, length, 32, requires_grad=True) for heads in (6, 2, 2)]
    fused = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    written_out = attend_in_window(512, length, torch.device("cpu"))(*parts)
    torch.testing.assert_close(written_out, fused, rtol=0, atol=1e-5)
    assert written_out.grad_fn is not None
    assert "Attention" not in written_out.grad_fn.name()
    direction = torch.randn_like(fused)
    gradients = [torch.autograd.grad(each, parts, direction) for each in (written_out, fused)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
