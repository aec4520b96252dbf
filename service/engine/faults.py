"""Breaks the engine on purpose and on a real process, so that what happens then is tested and not assumed."""

from __future__ import annotations

import threading
from typing import Final

from service.engine.batch import Batch, DecodeBatch, Layout
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
        self.name, self.build = inner.name, inner.build
        self.most_steps = 1  # or a step would be hidden in the middle of others
        self.most_prompt_tokens = inner.most_prompt_tokens

    @property
    def layout(self) -> Layout:
        return self._inner.layout

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        if isinstance(batch, DecodeBatch):
            self._step += 1
            self._happen(self._faults.get(self._step), batch)
        return self._inner.run(batch, steps)

    def clear(self, slot: int) -> None:
        self._inner.clear(slot)

    def rebuild(self) -> None:
        self._inner.rebuild()

    def pad_rows_to(self, multiple: int) -> None:
        self._inner.pad_rows_to(multiple)

    def _happen(self, fault: str | None, batch: DecodeBatch) -> None:
        if fault == "raise":
            raise RuntimeError("a fault that was asked for")
        if fault == "die":
            raise SystemExit  # which nobody on this thread catches
        if fault == "hang":
            threading.Event().wait()
        if fault == "nan":
            self._inner.cache.values[:, batch.slots[0]] = float("nan")
