"""Where the engine's thread meets the event loop: every step's events cross once and are handed to their streams.

The only module that both threads enter. Knows sequences and their events; has never heard of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress

from service.engine.reports import Figures, StepReport
from service.engine.sequence import Ended, Event, Sequence
from service.engine.thread import EngineThread
from service.logs import log_event
from service.metrics import Metrics


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

    async def next_events(self, timeout_s: float | None = None) -> list[Event]:
        """All events that are ready, at least one; none when the time is over first. Raises Abandoned."""
        if not self._news.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        if self._is_abandoned:
            raise Abandoned
        self._news.clear()
        events, self._events = self._events, []
        return events


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
            stream = self._streams[sequence]
            for event in events:
                self._record(stream, event, at)
            stream.deliver(events)

    def _record(self, stream: TokenStream, event: Event, at: float) -> None:
        if isinstance(event, Ended):
            self._close(stream, event)
            return
        if stream.last_token_at is None:
            self._metrics.record_first_token(at - stream.sequence.created_at)
        else:
            self._metrics.record_next_token(at - stream.last_token_at)
        stream.last_token_at = at

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


async def refresh_figures(engine: EngineThread, timeout_s: float) -> None:
    """Ask the engine for one consistent copy of its figures; after timeout_s its last copy has to do."""
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()

    def reply(_: Figures) -> None:
        loop.call_soon_threadsafe(answered.set)

    engine.figures(reply)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await answered.wait()
