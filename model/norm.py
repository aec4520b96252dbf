"""RMSNorm (Zhang and Sennrich 2019) whose backward pass is written out, for training on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, to the bit. On a CPU its backward composes the gradient of many more passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)"""
        if x.device.type == "cpu" and torch.is_grad_enabled():
            y: Tensor = _WrittenOut.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return super().forward(x)


class _WrittenOut(torch.autograd.Function):
    """y = n * weight with n = x / rms(x), and so dx = (g - n * mean(g * n)) / rms(x) with g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        reciprocal = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, reciprocal)
        return x * reciprocal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, reciprocal = ctx.saved_tensors
        normed = x * reciprocal
        d_weight = (dy * normed).flatten(0, -2).sum(dim=0)
        dx = dy * weight
        share = (dx * normed).mean(-1, keepdim=True)
        return dx.addcmul_(normed, share, value=-1).mul_(reciprocal), d_weight, None
