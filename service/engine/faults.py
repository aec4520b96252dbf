"""Breaks the engine on purpose and on a real process, so that what happens then is tested and not assumed."""

from __future__ import annotations

import threading
from typing import Final

from service.engine.batch import Batch, DecodeBatch, Layout
from service.engine.drawn import Drawn
from service.engine.runner import TorchRunner

KINDS: Final = ("raise", "die", "hang", "nan")


def is_fault(text: str) -> bool:
    """``raise:50`` is one: a kind and the decode step, from 1, in which it happens, once."""
    kind, _, step = text.partition(":")
    return kind in KINDS and step.isdecimal() and int(step) > 0


class FaultyRunner:
    """A runner with one fault to come. Everything else is the real one's."""

    def __init__(self, inner: TorchRunner, fault: str) -> None:
        assert is_fault(fault)
        self._inner = inner
        self._kind, _, step = fault.partition(":")
        self._steps_to_go = int(step)
        self.name = inner.name

    @property
    def layout(self) -> Layout:
        return self._inner.layout

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        if isinstance(batch, DecodeBatch):
            self._steps_to_go -= 1
            if not self._steps_to_go:
                self._happen(batch)
        return self._inner.run(batch, steps)

    def clear(self, slot: int) -> None:
        self._inner.clear(slot)

    def rebuild(self) -> None:
        self._inner.rebuild()

    def pad_rows_to(self, multiple: int) -> None:
        self._inner.pad_rows_to(multiple)

    def _happen(self, batch: DecodeBatch) -> None:
        if self._kind == "raise":
            raise RuntimeError("a fault that was asked for")
        if self._kind == "die":
            raise SystemExit  # which nobody on this thread catches
        if self._kind == "hang":
            threading.Event().wait()
        self._inner.cache.values[:, batch.slots[0]] = float("nan")
