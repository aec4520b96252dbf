"""The norm is PyTorch's; only how its gradient is computed is ours."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 48), (2, 3, 5, 16)])
def test_training_and_serving_see_the_bits_of_pytorchs_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape)
    expected = F.rms_norm(x, shape[-1:], norm.weight, 1e-6)
    assert torch.equal(norm(x), expected)
    with torch.inference_mode():
        assert torch.equal(norm(x), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=0.1).double()  # an eps that counts
    x, weight = torch.randn(4, 3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return output

    assert torch.autograd.gradcheck(normed, (x, weight))
