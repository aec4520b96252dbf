"""Text from a checkpoint, printed as it is drawn; the service's way of reading, one sequence at a time.

Letters: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import torch
from torch import Tensor

from model.generate import sampling_options
from model.kv_cache import KVCache
from model.router import Routing
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
    prompt, chunk = torch.tensor(prompt_ids, device=model.device), model.config.context_length
    for start in range(0, len(prompt), chunk):
        hidden, _ = read(model, cache, prompt[start : start + chunk], start)
    for position in range(len(prompt), len(prompt) + length):
        drawn = draw(model.head(hidden[:, -1]), options, torch.tensor([position], device=model.device))
        yield int(drawn)
        hidden, _ = read(model, cache, drawn, position)


def from_a_new_line(model: Transformer, tokenizer: Tokenizer, length: int, seed: int) -> str:
    """Text at temperature 0.8, after a newline if the vocabulary has one."""
    start = tokenizer.encode(tokenizer.fold("\n") or tokenizer.tokens[0])
    return tokenizer.decode(stream(model, start, length, temperature=0.8, top_k=0, top_p=1.0, seed=seed))


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


def read(model: Transformer, cache: KVCache, ids: Tensor, start: int) -> tuple[Tensor, list[Routing]]:
    """Feed a chunk (T,) at positions from start on to the cache's first slot -> (1, T, C) and each layer's routing."""
    positions = torch.arange(start, start + len(ids), device=ids.device)
    view = cache.prefill(slot=0, start=start, num_tokens=len(ids), num_rows=len(ids))
    return model.hidden(ids[None], positions[None], view.layer)
