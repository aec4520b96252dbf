"""The network, its sampling, its counting of experts and its file format: what training and serving share.

``from model import SparseMoE`` gives the layer alone. Nothing is imported before it is asked for, so that reading a
configuration or checking a checkpoint does not cost an ``import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.experts import SparseMoE

__all__ = ["SparseMoE"]


def __getattr__(name: str) -> Any:
    if name == "SparseMoE":
        from model.experts import SparseMoE

        return SparseMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
