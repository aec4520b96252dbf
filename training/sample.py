"""Text from a checkpoint, printed as it is drawn; the service's way of reading, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.generate import sampling_options
from model.kv_cache import KVCache
from model.sampling import draw
from model.transformer import Transformer


@torch.inference_mode()
def stream(
    model: Transformer, prompt_ids: list[int], length: int, *, temperature: float, top_k: int, top_p: float, seed: int
) -> Iterator[int]:
    """Draw ids one by one through a ring cache, for ever if asked."""
    options = sampling_options(model.device, temperature, top_k, top_p, seed)
    cache = KVCache(model.config, num_slots=1, device=model.device)
    for start in range(0, len(prompt_ids), model.config.context_length):
        chunk = prompt_ids[start : start + model.config.context_length]
        logits = _read(model, cache, chunk, start)
    for position in range(len(prompt_ids), len(prompt_ids) + length):
        token_id = int(draw(logits, options, torch.tensor([position], device=model.device)))
        yield token_id
        logits = _read(model, cache, [token_id], position)


def _read(model: Transformer, cache: KVCache, ids: list[int], start: int) -> torch.Tensor:
    """Feed a chunk at positions from start on; the logits (1, V) after its last token."""
    positions = torch.arange(start, start + len(ids), device=model.device)
    view = cache.prefill(slot=0, start=start, num_tokens=len(ids), num_rows=len(ids))
    hidden, _ = model.hidden(torch.tensor([ids], device=model.device), positions[None], view.layer)
    logits: torch.Tensor = model.head(hidden[:, -1])
    return logits
