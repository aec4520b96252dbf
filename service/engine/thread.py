"""The one thread that owns the model, and its mailbox. Any thread may call in; the engine knows nothing of them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from model.checkpoint import CheckpointError
from service.engine.reports import Figures, StepReport
from service.engine.sequence import FinishReason, Phase, Sequence

if TYPE_CHECKING:
    from service.engine.engine import Engine

log = logging.getLogger(__name__)

RAISING_STEPS_BEFORE_FAILURE = 3
HELD_UP_LOOK_S = 0.02
SAFE_SHARE_OF_QUEUE_TIME = 0.8
"""Who would probably wait longer than this share of the longest wait is refused at the door, not when it is over."""


class EnginePhase(StrEnum):
    """Where the engine is in its life; only a ready one takes sequences."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class QueueFull(Exception):
    """The queue has no place, or moves too slowly; trying again after retry_after_s seconds is sensible."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class CannotServe(Exception):
    """The engine cannot be built as it was asked for. One sentence that says what to change."""


class NotServing(Exception):
    """The engine is loading, draining or failed."""

    def __init__(self, phase: EnginePhase) -> None:
        super().__init__(f"the engine is {phase}")
        self.phase = phase


@dataclass(frozen=True)
class EngineInfo:
    """What a ready engine runs on. row_multiple is None where texts depend on how many are written at a time;
    processes with one fingerprint write the same text."""

    device: str
    threads: int
    runner: str
    num_slots: int
    torch_version: str
    row_multiple: int | None
    fingerprint: str


Build = Callable[[Callable[[EnginePhase], None]], "tuple[Engine, EngineInfo]"]
"""Loads and warms an engine, calling back when the phase changes. Called on the engine's thread."""


class EngineThread:
    """Runs an engine until it is drained. ``publish`` is called here after every step that brought anything."""

    def __init__(
        self,
        build: Build,
        publish: Callable[[StepReport], None],
        *,
        max_queued: int,
        grace_s: float,
        queue_timeout_s: float = 30.0,
    ) -> None:
        self._build = build
        self._publish = publish
        self._max_queued = max_queued
        self._grace_s = grace_s
        self._queue_timeout_s = queue_timeout_s
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._mail = threading.Condition()
        self._arrived: list[Sequence] = []
        self._cancelled: list[Sequence] = []
        self._asked: list[Callable[[Figures], None]] = []
        self._engine: Engine | None = None
        self._phase = EnginePhase.LOADING
        self._phase_since = time.monotonic()
        self._draining_since: float | None = None
        self._has_ended = False
        self._has_drained = False
        self._busy_since: float | None = None
        self._slot_seconds = 0.0  # over all slots, the time that each has been taken
        self._looked_at = time.monotonic()
        self._ends: deque[float] = deque(maxlen=32)  # slot_seconds at each of the last ends
        self.failure: str | None = None
        self.info: EngineInfo | None = None
        self.last_figures: Figures | None = None

    @property
    def phase(self) -> EnginePhase:
        return self._phase

    @property
    def phase_elapsed_s(self) -> float:
        return time.monotonic() - self._phase_since

    @property
    def is_over(self) -> bool:
        """It has drained or failed and will not do anything again."""
        return self._has_drained or self._phase is EnginePhase.FAILED

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its place is reserved by the time this returns. Raises QueueFull or NotServing."""
        with self._mail:
            if self._phase is not EnginePhase.READY or self._engine is None:
                raise NotServing(self._phase)
            waiting = len(self._arrived) + self._engine.num_waiting - self._engine.num_free_slots
            wait_s = self._expected_wait_s(waiting, self._engine.num_slots)
            is_too_slow = waiting > 0 and wait_s > SAFE_SHARE_OF_QUEUE_TIME * self._queue_timeout_s
            if waiting >= self._max_queued or is_too_slow:
                raise QueueFull(min(60, max(1, math.ceil(wait_s))))
            self._arrived.append(sequence)
            self._mail.notify()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that nobody waits for any more. Harmless when it has ended."""
        with self._mail:
            self._cancelled.append(sequence)
            self._mail.notify()

    def figures(self, reply: Callable[[Figures], None]) -> None:
        """Ask for one consistent copy of all figures, taken between two steps; reply is called on this thread.

        Once the engine has ended, the last copy is the answer, and the caller's own thread gives it.
        """
        with self._mail:
            if not self._has_ended:
                self._asked.append(reply)
                self._mail.notify()
                return
        if self.last_figures:
            reply(self.last_figures)

    def drain(self) -> None:
        """Take nothing more; end who waits, let who runs finish within the grace time, then stop. Idempotent."""
        with self._mail:
            if self._draining_since is None and self._phase is not EnginePhase.FAILED:
                self._draining_since = time.monotonic()
                self._enter(EnginePhase.DRAINING)
            self._mail.notify()

    @property
    def has_died(self) -> bool:
        """Its thread ended without a word, and cannot say so itself any more."""
        return self._has_ended and not self.is_over

    @property
    def busy_s(self) -> float:
        """For how long it has not come back from a step; 0 while it has nothing to do."""
        busy_since = self._busy_since  # read once: it changes on another thread
        return 0.0 if busy_since is None else time.monotonic() - busy_since

    def give_up(self) -> None:
        """Declare it failed from outside. Should the thread ever come back, it ends without another word."""
        self.failure = "the engine's thread has died" if self._has_ended else f"a step takes {self.busy_s:.1f} s"
        log.error("the engine is given up: %s", self.failure)
        self._enter(EnginePhase.FAILED)

    def _run(self) -> None:
        try:
            engine, self.info = self._build(self._enter)
            engine.forget_counts()
            self._engine = engine
            self._enter(EnginePhase.READY)
            self._serve(engine)
            self._has_drained = True
        except Exception as error:
            self._fail(error)
        finally:
            with self._mail:
                self._has_ended = True
                asked, self._asked = self._asked, []
            self._answer(asked)

    def _serve(self, engine: Engine) -> None:
        raised: Counter[Phase | None] = Counter()
        while not self._read_mail(engine):
            try:
                self._deliver(StepReport(engine.expire()))
                report = engine.step()
                self._deliver(report)
            except Exception:
                raised[engine.last_phase] += 1
                log.exception("a step raised; its sequences end")
                self._deliver(StepReport(engine.end_running(FinishReason.INTERNAL)))
                engine.rebuild()
                if raised[engine.last_phase] == RAISING_STEPS_BEFORE_FAILURE:
                    raise
            else:
                raised[report.phase] = 0  # where only decoding is broken, prompts are still read

    def _read_mail(self, engine: Engine) -> bool:
        """Sleep until there is something to do and take in what has arrived. True when drained: all have ended."""
        with self._mail:
            self._busy_since = None
            while not (self._arrived or self._cancelled or self._asked or engine.has_work or self._draining_since):
                self._mail.wait()
            if engine.is_held_up and not (self._arrived or self._cancelled or self._asked):
                self._mail.wait(HELD_UP_LOOK_S)
            self._busy_since = now = time.monotonic()
            self._slot_seconds += engine.num_running * (now - self._looked_at)  # after the wait: nobody ran while idle
            self._looked_at = now
            for sequence in self._arrived:
                engine.add(sequence)
            cancelled, asked, draining_since = self._cancelled, self._asked, self._draining_since
            self._arrived, self._cancelled, self._asked = [], [], []
        self._deliver(StepReport(engine.end(cancelled, FinishReason.CANCELLED)))
        if draining_since is not None:  # nothing can arrive any more, and all that had arrived is in the engine
            self._end_for_shutdown(engine, draining_since)
        if asked or (draining_since is not None and not engine.has_work):
            self.last_figures = engine.figures()
        self._answer(asked)
        is_drained = draining_since is not None and not engine.has_work
        return is_drained or self._phase is EnginePhase.FAILED

    def _end_for_shutdown(self, engine: Engine, since: float) -> None:
        self._deliver(StepReport(engine.end_waiting(FinishReason.SHUTDOWN)))
        if time.monotonic() - since >= self._grace_s:
            self._deliver(StepReport(engine.end_running(FinishReason.SHUTDOWN)))

    def _answer(self, asked: list[Callable[[Figures], None]]) -> None:
        for reply in asked:
            try:
                if self.last_figures:
                    reply(self.last_figures)
            except Exception:  # whoever asked is gone; that is no reason to end anybody's text
                log.exception("an answer could not be given")

    def _deliver(self, report: StepReport) -> None:
        if not report.events and not report.phase:
            return
        ended = sum(sequence.is_finished and sequence.admitted_at is not None for sequence, _ in report.events)
        self._ends.extend([self._slot_seconds] * ended)
        try:
            self._publish(report)
        except Exception:  # the step itself was good, and its other sequences go on
            log.exception("a step could not be published")

    def _expected_wait_s(self, waiting: int, num_slots: int) -> float:
        """How long one more would wait behind so many, from how long slots have been taken for each sequence lately.

        Little's law: slots over mean time in a slot is the rate at which the queue moves, idle times or not. Slots that
        are taken for long by few count with their time, as they are taken and not only when they are given back.
        """
        if waiting < 0:
            return 0.0
        ends = list(self._ends)
        seconds_each = (self._slot_seconds - (ends[0] if ends else 0.0)) / max(1, len(ends))
        return (waiting + 1) * seconds_each / num_slots

    def _fail(self, error: Exception) -> None:
        is_refusal = isinstance(error, CannotServe | CheckpointError)  # a sentence for the user; whoever waits reads it
        if not is_refusal:
            log.error("the engine has failed: %s", error, exc_info=error)
        with self._mail:
            self.failure = str(error) or type(error).__name__
            self._enter(EnginePhase.FAILED)
            arrived, self._arrived = self._arrived, []
        if self._engine:
            for sequence in arrived:
                self._engine.add(sequence)
            self._deliver(StepReport(self._engine.end_running(FinishReason.INTERNAL)))
            self._deliver(StepReport(self._engine.end_waiting(FinishReason.INTERNAL)))

    def _enter(self, phase: EnginePhase) -> None:
        """Change the phase. A draining engine that is still loading goes on draining."""
        with self._mail:
            if self._draining_since is None or phase in (EnginePhase.DRAINING, EnginePhase.FAILED):
                self._phase = phase
                self._phase_since = time.monotonic()
