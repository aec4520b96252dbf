"""Breaks the engine on purpose and on a real process, so that what happens then is tested and not assumed."""

from __future__ import annotations

import threading
from typing import Any, Final

from service.engine.batch import Batch, DecodeBatch
from service.engine.drawn import Drawn
from service.engine.native.runner import NativeRunner
from service.engine.runner import TorchRunner

KINDS: Final = ("raise", "die", "hang", "nan")


def is_fault(text: str) -> bool:
    """``raise:50`` is one: a kind and the decode step, from 1, in which it happens, once. Several stand in a row."""
    faults = [fault.partition(":") for fault in text.split(",")]
    return all(kind in KINDS and step.isdecimal() for kind, _, step in faults)


class FaultyRunner:
    """A runner with faults to come. Everything else is the real one's."""

    def __init__(self, inner: TorchRunner | NativeRunner, fault: str) -> None:
        self._inner = inner
        self._faults = {int(step): kind for kind, _, step in (each.partition(":") for each in fault.split(","))}
        self._step = 0
        self.most_steps = 1  # or a step would be hidden in the middle of others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        if isinstance(batch, DecodeBatch):
            self._step += 1
            self._happen(self._faults.get(self._step), batch)
        return self._inner.run(batch, steps)

    def _happen(self, fault: str | None, batch: DecodeBatch) -> None:
        if fault == "raise":
            raise RuntimeError("a fault that was asked for")
        if fault == "die":
            raise SystemExit  # which nobody on this thread catches
        if fault == "hang":
            threading.Event().wait()
        if fault == "nan":
            self._inner.cache.values[:, batch.slots[0]] = float("nan")
