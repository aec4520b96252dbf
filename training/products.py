"""By which library a training step on a CPU multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Multiply by oneDNN on a CPU, which on AMD's is 2.3 times as fast as MKL, unless it would round the factors.

    The mode that chooses oneDNN allows it bfloat16. Most processors have nothing to gain by that; one with units for
    bfloat16 matrices (AMX) would be 1.3 times as fast, but two ranks would no longer give the loss of one.
    """
    if device.type == "cpu" and onednn_keeps_float32():
        with _onednn():
            yield
    else:
        yield


@cache
def onednn_keeps_float32() -> bool:
    """Whether its quick mode multiplies float32 by float32 on this machine."""
    fine = torch.full((256, 256), 1 + 2**-12)  # bfloat16 has 8 bits
    with _onednn():
        return bool((fine @ torch.eye(256) == fine).all())


@contextmanager
def _onednn() -> Iterator[None]:
    products = cast(Any, torch.backends.mkldnn).matmul  # set when it is imported, so that no checker knows it
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
