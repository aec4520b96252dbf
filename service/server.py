"""uvicorn, taught to drain: signals reach the engine, and the process ends when the engine has. Knows no routes."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn, cast

import uvicorn
from fastapi import FastAPI

from service.engine.thread import EnginePhase, EngineThread
from service.logs import log_event
from service.protocol import Bounds, Protocol

EXIT_REFUSED: Final = 1
EXIT_FAILED: Final = 70
FLUSH_S: Final = 5.0
FAILED_FOR_S: Final = 1.0
TICKS_PER_LOOK: Final = 10  # of a tenth of a second
ACCEPTED_AT_ONCE: Final = 64
WAITING_TO_BE_ACCEPTED: Final = 2048
STARTING: Final = frozenset({EnginePhase.LOADING, EnginePhase.WARMING})


class Server(uvicorn.Server):
    """Goes on answering while it drains, so that probes and refusals are heard; a second signal ends it on the spot.

    uvicorn's own way closes the port at once, waits for streams for ever, and dies by the signal instead of returning.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, bounds: Bounds, withdraw: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Protocol, bounds)),
            loop="asyncio",  # also where uvloop is installed: Ray brings it
            ws="none",
            log_config=None,
            log_level="error",  # whoever does not speak HTTP, or wants to upgrade it, is worth no warning
            access_log=False,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
        )
        super().__init__(config)
        self._engine: EngineThread = app.state.engine
        self._listener = listener
        self._withdraw = withdraw
        self._is_draining = False
        self._is_announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining:
            self.end_at_once(128 + sig)  # whoever asks twice does not want to wait for anything
        self._is_draining = True
        # The handler may have interrupted anything, a half-written log line included.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain, sig)

    def _drain(self, sig: int) -> None:
        log_event("draining", signal=signal.Signals(sig).name)
        if self._engine.phase in STARTING:
            self.end_at_once(0)  # nobody is being served, and loading cannot be interrupted any other way
        self._engine.drain()

    def end_at_once(self, code: int) -> NoReturn:
        """Past Python's own way out, which waits for the engine's thread, or crashes under it, and calls atexit's."""
        try:
            self._withdraw()
        finally:  # whatever the file system says to that
            os._exit(code)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio takes the one number for both: how many may wait, and how many it takes on in one go.
        self._listener.listen(WAITING_TO_BE_ACCEPTED)

    async def main_loop(self) -> None:
        try:
            await super().main_loop()
        except Exception:  # a bug; uvicorn gives the app no chance to say goodbye then
            await self._end_engine()
            raise

    async def _end_engine(self) -> None:
        """Python aborts the process when it ends under the engine's thread."""
        self._engine.drain()
        while not self._engine.is_over:
            await asyncio.sleep(0.05)
        self._engine.join(FLUSH_S)

    async def on_tick(self, counter: int) -> bool:
        if self._engine.phase is EnginePhase.READY and not self._is_announced:
            self._is_announced = True
            gc.freeze()  # what is loaded stays: looking through it for garbage would hold up every stream
            announce(self._listener)
        self.should_exit = self.should_exit or self._is_done()
        if counter % TICKS_PER_LOOK == 0:
            for connection in list(self.server_state.connections):
                cast(Protocol, connection).look()
        return await super().on_tick(counter)

    def _is_done(self) -> bool:
        """The engine is over; one that failed while serving is outlived for a moment, in which probes can say so."""
        if self._engine.phase is EnginePhase.FAILED and self._engine.info is not None:
            return self._engine.phase_elapsed_s >= FAILED_FOR_S
        return self._engine.is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(FLUSH_S, self._cut_connections)
        await super().shutdown(sockets)

    def _cut_connections(self) -> None:
        """All streams have ended by now; a client that has still not read the end is not going to."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(app: FastAPI, listener: socket.socket, withdraw: Callable[[], None]) -> int:
    """Serve until a signal or until the engine fails; the exit code. Where atexit is not called, withdraw is."""
    bounds = Bounds(connections=raise_connection_limit())
    server = Server(app, listener, bounds, withdraw)
    server.run(sockets=[listener])
    engine: EngineThread = app.state.engine
    if engine.phase is EnginePhase.FAILED and engine.info is None:
        print(f"moescope: {engine.failure}", file=sys.stderr)  # it never ran: a refusal like those before it
        return EXIT_REFUSED
    log_event("ended")
    if engine.phase is EnginePhase.FAILED:
        server.end_at_once(EXIT_FAILED)
    return 0


def raise_connection_limit() -> int:
    """How many connections there can be, once this process may open as many files as the machine lets it.

    Some are for the page's files, the log, the engine and what is accepted in one go. A connection that finds no
    number free would be worse than one that is closed: asyncio goes on trying to accept it, with a traceback each time.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says unlimited, and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(soft - 4 * ACCEPTED_AT_ONCE, soft // 2)


def announce(listener: socket.socket) -> None:
    """Tell a person at the terminal where to go."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}"
    text = (
        f"Moescope is ready: {url}/\n"
        f"  metrics  {url}/metrics\n"
        f"  try it   curl -N {url}/generate -H 'Content-Type: application/json' -d '{{\"prompt\": \"ROMEO:\"}}'\n"
        "  stop it  Ctrl-C\n"
    )
    with suppress(OSError, AttributeError):  # nobody has to be there to read it, nor a standard output
        os.write(sys.stdout.fileno(), text.encode())  # unbuffered: Python would try again at the end and exit with 120
