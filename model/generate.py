"""The reference: uncached generation that reads the whole text again for every token. Slow, short and right.

The engine must agree with it token by token. The text is never cropped to the context: under the window's mask a
second layer sees twice as far back as a first, so cropping computes another function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.sampling import SamplingBatch, draw
from model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    disabled: Tensor | None = None,
) -> list[int]:
    """Draw max_new_tokens ids after a prompt of at least one id. Temperature 0 is greedy. disabled (1, L, E), bool."""
    options = sampling_options(model.device, temperature, top_k, top_p, seed, min_p)
    ids = torch.tensor(prompt_ids, device=model.device)
    for _ in range(max_new_tokens):
        logits, _ = model(ids[None], disabled)
        position = torch.tensor([len(ids)], device=model.device)
        ids = torch.cat((ids, draw(logits[:, -1], options, position)))
    return ids[len(prompt_ids) :].tolist()


def sampling_options(
    device: torch.device, temperature: float, top_k: int, top_p: float, seed: int, min_p: float = 0.0
) -> SamplingBatch:
    """The options of one row."""
    return SamplingBatch(
        temperature=torch.tensor([temperature], dtype=torch.float64, device=device),
        top_k=torch.tensor([top_k], device=device),
        top_p=torch.tensor([top_p], dtype=torch.float64, device=device),
        min_p=torch.tensor([min_p], dtype=torch.float64, device=device),
        seed=torch.tensor([seed], device=device),
    )
