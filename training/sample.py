"""Text from a checkpoint, printed as it is drawn; the service's way of reading, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import torch

from model.generate import sampling_options
from model.kv_cache import KVCache
from model.sampling import draw
from model.tokenizer import Tokenizer
from model.transformer import Transformer

ATTEMPTS = 10
"""What is tried for each item, before a model that writes empty ones is given up."""


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


def items(
    model: Transformer,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """Draw items of at most length tokens, each from a newline to the next and from a seed of its own.

    Empty ones are skipped; a model that writes hardly anything else gives fewer than count.
    """
    start, written = tokenizer.encode("\n"), 0
    for attempt in range(ATTEMPTS * count):
        own = (seed + attempt) % 2**63
        drawn = stream(model, start, length, temperature=temperature, top_k=top_k, top_p=top_p, seed=own)
        text = tokenizer.decode(takewhile(lambda token_id: "\n" not in tokenizer.decode([token_id]), drawn))
        if text.strip():
            yield text
            written += 1
        if written == count:
            return


def _read(model: Transformer, cache: KVCache, ids: list[int], start: int) -> torch.Tensor:
    """Feed a chunk at positions from start on; the logits (1, V) after its last token."""
    positions = torch.arange(start, start + len(ids), device=model.device)
    view = cache.prefill(slot=0, start=start, num_tokens=len(ids), num_rows=len(ids))
    hidden, _ = model.hidden(torch.tensor([ids], device=model.device), positions[None], view.layer)
    logits: torch.Tensor = model.head(hidden[:, -1])
    return logits
