"""RMSNorm (Zhang and Sennrich 2019) whose backward pass is written out, for training on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, to the bit. On a CPU its backward composes the gradient of many more passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)"""
        if x.device.type == "cpu" and torch.is_grad_enabled():
            y: Tensor
            y, _ = cast(Any, _WrittenOut).apply(x, self.weight, self.eps)
            return y
        return super().forward(x)


class _WrittenOut(torch.autograd.Function):
    """y = n * weight with n = x / rms(x), and so dx = (g - n * mean(g * n)) / rms(x) with g = dy * weight."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        reciprocal = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * reciprocal * weight, reciprocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        dy = gradients[0]
        x, weight, reciprocal = ctx.saved_tensors
        normed = x * reciprocal
        d_weight = (dy * normed).flatten(0, -2).sum(dim=0)
        dx = dy * weight
        share = (dx * normed).mean(-1, keepdim=True)
        return dx.addcmul_(normed, share, value=-1).mul_(reciprocal), d_weight, None
