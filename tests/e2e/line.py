"""A slow line between a page and its server. The server writes a text in no time; over this line it comes while a test
looks, and because a reader so slow holds the server up, there is a rest to lose when the server goes away."""

import socket
import socketserver
import threading
import time
from types import TracebackType
from typing import Self

from tests.service.crowd import narrow_connection

BYTES_PER_S = 400_000
"""About 1,500 letters with their experts. What the kernel and the server hold for who does not read is more than that."""
PIECE = 4096


class Line:
    """Passes on what is said on a port of its own, whichever server is at the other end by then."""

    def __init__(self, port_of_server: int) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                carry(self.request, port_of_server)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def carry(page: socket.socket, port: int) -> None:
    """One connection of the page's, until either side is gone; then the other hears of it."""
    try:
        server = narrow_connection(port)
    except ConnectionError:
        return
    asks = threading.Thread(target=pump, args=(page, server, None), daemon=True)
    asks.start()
    pump(server, page, BYTES_PER_S)
    asks.join()
    server.close()


def pump(source: socket.socket, target: socket.socket, bytes_per_s: int | None) -> None:
    try:
        while piece := source.recv(PIECE):
            target.sendall(piece)
            if bytes_per_s:
                time.sleep(len(piece) / bytes_per_s)
    except OSError:
        pass  # it is gone
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
