"""A slow line between a page and its server. The server writes a text in no time; over this line it comes while a test
looks, and because a reader so slow holds the server up, there is a rest to lose when the server goes away."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.service.crowd import narrow_connection

BYTES_PER_S = 400_000
"""About 1,500 letters with their experts."""
PIECE = 4096


@contextmanager
def slow_line(port: int) -> Iterator[str]:
    """The address of its other end, from where whichever server listens at the port by then is reached."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            carry(self.request, port)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as line:
        line.daemon_threads = True
        thread = threading.Thread(target=line.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{line.server_address[1]}"
        finally:
            line.shutdown()
            thread.join()


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
    with suppress(OSError):  # one of them is gone
        while piece := source.recv(PIECE):
            target.sendall(piece)
            if bytes_per_s:
                time.sleep(len(piece) / bytes_per_s)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
