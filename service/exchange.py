"""Where the engine's thread meets the event loop: every step's events cross once and are handed to their streams.

The only module that both threads enter. Knows sequences and their events; has never heard of HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from contextlib import suppress

from service.engine.reports import Figures, StepReport
from service.engine.sequence import Ended, Event, FinishReason, Sequence
from service.engine.thread import EnginePhase, EngineThread
from service.expert_window import SNAPSHOT_EVERY_S, ExpertWindow
from service.logs import log_event
from service.metrics import Metrics

LOOK_EVERY_S = 0.25
NUDGE_EVERY_S = 1.0
SECOND_LOOK_AFTER_S = 1.0
FIGURES_WAIT_S = 0.5
ANSWERING = frozenset({EnginePhase.READY, EnginePhase.DRAINING})


class Abandoned(Exception):
    """The client went away; nobody reads this stream any more."""


class TokenStream:
    """What the engine has said about one sequence and the client has not been told yet. Lives on the event loop."""

    def __init__(self, sequence: Sequence, request_id: str, *, streams: bool) -> None:
        self.sequence = sequence
        self.request_id = request_id
        self.streams = streams
        self.last_token_at: float | None = None
        self.has_ended = False
        self._events: list[Event] = []
        self._is_abandoned = False
        self._news = asyncio.Event()

    def deliver(self, events: Iterable[Event]) -> None:
        self._events.extend(events)
        self._news.set()

    def abandon(self) -> None:
        self._is_abandoned = True
        self._news.set()

    def nudge(self) -> None:
        """Let whoever waits for events look at the clock."""
        self._news.set()

    async def next_events(self, patience_s: float = math.inf) -> list[Event]:
        """All events that are ready, at least one; none after about so many seconds without. Raises Abandoned."""
        asked_at = time.monotonic()
        while not (self._events or self._is_abandoned) and time.monotonic() - asked_at < patience_s:
            await self._news.wait()
            self._news.clear()
        if self._is_abandoned:
            raise Abandoned
        events, self._events = self._events, []
        return events

    def take(self, num_tokens: int) -> None:
        """So many more tokens have left for the client: the engine pauses and ends a sequence by what has not."""
        self.sequence.num_taken += num_tokens


class Exchange:
    """All open streams. One crossing per step whatever the number of rows: the loop and the engine share the GIL."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._streams: dict[Sequence, TokenStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has to come before the engine's thread starts."""
        self._loop = loop

    def publish(self, report: StepReport) -> None:
        """Called on the engine's thread, once per step; never blocks."""
        assert self._loop is not None, "the engine runs before the exchange is attached"
        self._loop.call_soon_threadsafe(self._deliver, report, time.monotonic())

    def open(self, engine: EngineThread, sequence: Sequence, request_id: str, *, streams: bool) -> TokenStream:
        """Submit a sequence and listen for its events. Raises what ``submit`` raises, leaving nothing behind."""
        stream = self._streams[sequence] = TokenStream(sequence, request_id, streams=streams)
        try:
            engine.submit(sequence)
        except Exception:
            del self._streams[sequence]
            raise
        return stream

    def _deliver(self, report: StepReport, at: float) -> None:
        self._metrics.record_step(report)
        for sequence, events in report.events:
            stream = self._streams.get(sequence)
            if stream is None:  # ended by ``end_all``, and its engine has come back after all
                continue
            self._record(stream, events, at)
            stream.deliver(events)

    def end_all(self) -> None:
        """End every open stream as failed, for an engine that does so no more. On the event loop."""
        now = time.monotonic()
        lost = [
            (each, (each.end_record(FinishReason.INTERNAL, now, 0, ()),)) for each in self._streams
        ]  # nobody counts now
        self._deliver(StepReport(tuple(lost)), now)

    def nudge(self) -> None:
        for stream in self._streams.values():
            stream.nudge()

    def _record(self, stream: TokenStream, events: tuple[Event, ...], at: float) -> None:
        ended = events[-1] if isinstance(events[-1], Ended) else None
        num_tokens = len(events) - (ended is not None)
        if num_tokens and stream.last_token_at is None:
            self._metrics.record_first_token(at - stream.sequence.created_at)
            num_tokens, stream.last_token_at = num_tokens - 1, at
        if num_tokens and stream.last_token_at is not None:
            self._metrics.record_next_tokens(at - stream.last_token_at, num_tokens)
            stream.last_token_at = at
        if ended:
            self._close(stream, ended)

    def _close(self, stream: TokenStream, ended: Ended) -> None:
        stream.has_ended = True
        del self._streams[stream.sequence]
        self._metrics.record_end(ended, stream=stream.streams)
        log_event(
            "generated",
            id=stream.request_id,
            reason=ended.reason,
            prompt_tokens=ended.prompt_tokens,
            generated_tokens=ended.generated_tokens,
            queue_s=round(ended.queue_s, 4),
            ttft_s=None if ended.ttft_s is None else round(ended.ttft_s, 4),
            total_s=round(ended.total_s, 4),
        )


async def watch(engine: EngineThread, exchange: Exchange, stuck_after_s: float) -> None:
    """Looks after the engine until it is over; one that is dead or stuck is given up. No stream outlives it.

    A step that seems stuck is looked at twice: after a pause of the whole process everything looks late for a moment.
    """
    suspected_at = math.inf
    while not engine.is_over:
        await asyncio.sleep(LOOK_EVERY_S)
        is_stuck = engine.busy_s > stuck_after_s
        suspected_at = min(suspected_at, time.monotonic()) if is_stuck else math.inf
        if engine.has_died or time.monotonic() - suspected_at >= SECOND_LOOK_AFTER_S:
            engine.give_up()
    await asyncio.sleep(LOOK_EVERY_S)  # in which an engine that failed by itself tells of its ends
    exchange.end_all()


async def nudge(exchange: Exchange) -> None:
    """Wakes all streams now and then for their pings: a timer for each wait was a sixth of a token's time here."""
    while True:
        await asyncio.sleep(NUDGE_EVERY_S)
        exchange.nudge()


async def keep_snapshots(engine: EngineThread, window: ExpertWindow) -> None:
    """Gives the window its snapshots for as long as the engine lives, whether or not anybody looks at them."""
    while not engine.is_over:
        await refresh_figures(engine)
        if engine.last_figures:
            window.keep(engine.last_figures)
        await asyncio.sleep(SNAPSHOT_EVERY_S)


async def refresh_figures(engine: EngineThread) -> None:
    """Ask the engine for one consistent copy of its figures; after FIGURES_WAIT_S its last copy has to do."""
    if engine.phase not in ANSWERING:
        return
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()

    def reply(_: Figures) -> None:
        loop.call_soon_threadsafe(answered.set)

    engine.figures(reply)
    with suppress(TimeoutError):
        async with asyncio.timeout(FIGURES_WAIT_S):
            await answered.wait()
