"""uvicorn, taught to drain: signals reach the engine, and the process ends when the engine has. Knows no routes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from service.engine.thread import EnginePhase, EngineThread
from service.logs import log_event

EXIT_FAILED: Final = 70
FLUSH_S: Final = 5.0
STARTING: Final = frozenset({EnginePhase.LOADING, EnginePhase.WARMING})


class Server(uvicorn.Server):
    """Goes on answering while it drains, so that probes and refusals are heard; a second signal ends it on the spot.

    uvicorn's own way closes the port at once, waits for streams for ever, and dies by the signal instead of returning.
    """

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, ws="none"))
        self._engine: EngineThread = app.state.engine
        self._listener = listener
        self._is_draining = False
        self._is_announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining:
            os._exit(128 + sig)  # whoever asks twice does not want to wait for anything
        self._is_draining = True
        # The handler may have interrupted anything, a half-written log line included.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain, sig)

    def _drain(self, sig: int) -> None:
        log_event("draining", signal=signal.Signals(sig).name)
        if self._engine.phase in STARTING:
            os._exit(0)  # nobody is being served, and loading cannot be interrupted any other way
        self._engine.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._engine_end = asyncio.create_task(asyncio.to_thread(self._engine.join))

    async def on_tick(self, counter: int) -> bool:
        if self._engine.phase is EnginePhase.READY and not self._is_announced:
            self._is_announced = True
            announce(self._listener)
        self.should_exit = self.should_exit or self._engine_end.done()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(FLUSH_S, self._cut_connections)
        await super().shutdown(sockets)

    def _cut_connections(self) -> None:
        """All streams have ended by now; a client that has still not read the end is not going to."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(app: FastAPI, listener: socket.socket) -> int:
    """Serve until a signal or until the engine fails; the process's exit code."""
    server = Server(app, listener)
    server.run(sockets=[listener])
    engine: EngineThread = app.state.engine
    log_event("ended")
    return EXIT_FAILED if engine.phase is EnginePhase.FAILED else 0


def announce(listener: socket.socket) -> None:
    """Tell a person at the terminal where to go."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}"
    print(
        f"Moescope is ready: {url}/\n"
        f"  metrics  {url}/metrics\n"
        f"  try it   curl -N {url}/generate -H 'Content-Type: application/json' -d '{{\"prompt\": \"ROMEO:\"}}'\n"
        "  stop it  Ctrl-C",
        flush=True,
    )
