"""The service in the test's own process, behind real HTTP: ready in half a second, and open to be looked into."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from service import server as edge
from service.app import create_app
from service.protocol import Bounds
from service.settings import read_settings
from tests.service.serving import PATIENCE_S, Service, wait_until

BOUNDS = Bounds(connections=64)


class Here(Service):
    def __init__(self, server: edge.Server, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[1])
        self.server = server
        self.listener = listener


@contextmanager
def served_here(*flags: object, bounds: Bounds = BOUNDS) -> Iterator[Here]:
    """Until the end of the block, from when it is ready."""
    app = create_app(read_settings([*map(str, flags)]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = Here(edge.Server(app, listener, bounds), listener)
        thread = threading.Thread(target=here.server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: httpx.get(f"{here.url}/readyz").status_code == 200)  # on no connection that stays
            yield here
        finally:
            here.client.close()
            app.state.engine.drain()
            thread.join(PATIENCE_S)
