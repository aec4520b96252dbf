"""Many clients at once on one event loop, over real sockets. Knows the wire, nothing of the code behind it."""

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.service.serving import Event, parse_events

T = TypeVar("T")


@dataclass
class Told:
    """Everything a client heard. ``arrived`` has the moment at which each token came, in time.monotonic seconds."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    arrived: list[float] = field(default_factory=list)
    ended_at: float = 0.0

    @property
    def events(self) -> list[Event]:
        """Those that came whole; a connection may have broken in the middle of one."""
        return parse_events(self.content[: self.content.rfind(b"\n\n") + 1].decode().split("\n"))

    @property
    def last_event_id(self) -> str:
        """What a client that was cut off would send."""
        whole = self.content[: self.content.rfind(b"\n\n") + 1]
        return whole[whole.rfind(b"id: ") + 4 :].partition(b"\n")[0].decode()

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == "token"]

    @property
    def text(self) -> str:
        return "".join(token["text"] for token in self.tokens)

    @property
    def ends(self) -> list[Event]:
        return [event for event in self.events if event[0] in ("done", "error")]

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def request(body: dict[str, Any], last_event_id: str | None = None, path: str = "/generate") -> bytes:
    content = json.dumps({"prompt": "", **body}).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *([] if last_event_id is None else [f"Last-Event-ID: {last_event_id}"]),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def ask(
    port: int,
    body: dict[str, Any],
    *,
    last_event_id: str | None = None,
    leave: Callable[[Told], bool] = lambda told: False,
) -> Told:
    """Ask and listen until the answer is complete, the connection breaks or ``leave`` says so (then it is reset)."""
    return await say(port, request(body, last_event_id), leave=leave)


async def say(port: int, content: bytes, *, leave: Callable[[Told], bool] = lambda told: False) -> Told:
    """The same with a request of whatever bytes."""
    told = Told()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    writer.write(content)
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        told.status = int(head[0].split()[1])
        told.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        async for piece in _body(reader, told.headers):
            told.content += piece
            told.arrived += [time.monotonic()] * piece.count(b"event: token\n")
            if leave(told):
                writer.transport.abort()
                break
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # what was heard until then is what this is about
    finally:
        told.ended_at = time.monotonic()
        writer.close()
    return told


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline() or b"0", 16):
        yield (await reader.readexactly(size + 2))[:-2]


def narrow_connection(port: int) -> socket.socket:
    """One that holds little: the kernel keeps 50 to 100 kB for who does not read, where it would keep 4 MB."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # the sender's buffer grows with this
    connection.connect(("127.0.0.1", port))
    return connection


def hold_connections(port: int) -> None:
    """The life of a child process: sends each request that comes on standard input, in hex, and never reads."""
    held = []
    for line in sys.stdin:
        held.append(narrow_connection(port))
        held[-1].sendall(bytes.fromhex(line))
        print(flush=True)


async def at_once(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*coroutines))


async def in_turn(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return [await coroutine for coroutine in coroutines]
