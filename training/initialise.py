"""The first weights of a model. Knows no optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from model.transformer import Transformer

SWITCH_SCALE = 0.1

# A standard normal cut off at two standard deviations has this one left.
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def initialise(model: Transformer, seed: int, init: str = "zero_output") -> None:
    """Fill a model's weights. Embeddings are unit normal and norms are 1; every matrix of I inputs and O outputs is

    - zero_output: normal of variance 1 / I, so that a unit input gives a unit output, but zero where it writes to the
      residual stream, in the head and in the router
    - kaiming: normal of variance 2 / I (He et al. 2015), as makeMoE has it in every linear layer
    - xavier: normal of variance 2 / (I + O) (Glorot and Bengio 2010)
    - truncated_normal: of variance 0.1 / I, nothing beyond two standard deviations before the variance is mended
      (Fedus et al. 2021, section 2.4)

    Depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name.startswith("embedding"):
            _fill_normal(parameter, 1.0, generator)
        elif init == "zero_output" and is_zero_at_first(name):
            parameter.zero_()
        elif init == "truncated_normal":
            std = variance(init, parameter) ** 0.5 / TRUNCATED_STD
            fresh = torch.empty(parameter.shape)
            parameter.copy_(torch.nn.init.trunc_normal_(fresh, 0, std, -2 * std, 2 * std, generator))
        else:
            _fill_normal(parameter, variance(init, parameter) ** 0.5, generator)


def variance(init: str, matrix: Tensor) -> float:
    """What the weights of a matrix (..., O, I) have, if they are not zero."""
    outputs, inputs = matrix.shape[-2:]
    return {
        "zero_output": 1 / inputs,
        "kaiming": 2 / inputs,
        "xavier": 2 / (inputs + outputs),
        "truncated_normal": SWITCH_SCALE / inputs,
    }[init]


def is_zero_at_first(name: str) -> bool:
    return name.endswith(
        ("attention.out.weight", "experts.down", "router.weight", "router.group_weight", "head.weight")
    )


def _fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
