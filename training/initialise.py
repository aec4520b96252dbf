"""The first weights of a model. Knows no optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Zero-output init: whatever writes to the residual stream, the head and the router begin at zero.

    The other matrices are normal with variance 1 / fan-in, so that a unit input gives a unit output; embeddings are
    unit normal and norms are 1. Depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif is_zero_at_first(name):
            parameter.zero_()
        else:
            fan_in = 1 if name.startswith("embedding") else parameter.shape[-1]
            _fill_normal(parameter, fan_in**-0.5, generator)


def is_zero_at_first(name: str) -> bool:
    return name.endswith(("attention.out.weight", "experts.down", "router.weight", "head.weight"))


def _fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
