"""One connection, taught its limits: what is late, too large, or never read gives its descriptor back. No routes.

uvicorn has a time limit for idle connections only: a request that comes one byte a minute, or an answer that is never
read, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.body import BODY_S
from service.errors import ApiError
from service.logs import log_event
from service.middleware import COMMON_HEADERS


@dataclass(frozen=True)
class Bounds:
    """Seconds for a request's head, for its body, and for an answer's bytes to move; bytes and lines of a head;
    requests that may wait behind an answer."""

    connections: int
    head_s: float = 10.0
    body_s: float = BODY_S
    stalled_s: float = 15.0
    head_bytes: int = 32_768
    headers: int = 100
    pipelined: int = 16


class CountingTransport:
    """A transport that knows what has left it. The size of a buffer alone cannot tell a standstill from a balance.

    The head of an answer leaves with what is written directly after it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written = 0
        self._head = b""

    @property
    def sent(self) -> int:
        return self._written - self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        self._written += len(data)
        if not self._head and data.startswith(b"HTTP/"):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Parser(HttpRequestParser):
    """Goes on reading where a client offers another protocol; its own would take the body for that protocol's."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def feed_data(self, data: Any) -> None:
        try:
            super().feed_data(data)
        except HttpParserUpgrade as upgrade:
            if not self._protocol.is_offered_upgrade:
                raise
            self.feed_data(self._protocol.head_without_upgrade() + data[upgrade.args[0] :])


class Protocol(HttpToolsProtocol):
    """Answers what is not HTTP, and reaches no application, in the shape of all other refusals."""

    transport: CountingTransport  # type: ignore[assignment]

    def __init__(self, bounds: Bounds, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = Parser(self)
        self._bounds = bounds
        self._answering: RequestResponseCycle | None = None
        self._refusal = "bad_request"
        self._due: float | None = None
        self._is_in_body = False
        self._head_bytes = 0
        self._unseen_bytes = 0
        self._sent, self._sent_at = -1, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counting = CountingTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, counting))  # it hands on all that it does not do itself
        self._due = self.loop.time() + self._bounds.head_s
        if len(self.connections) > self._bounds.connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._due is None:
            self._due = self.loop.time() + self._bounds.head_s
        self._unseen_bytes += len(data)
        super().data_received(data)
        if self._unseen_bytes > self._bounds.head_bytes and not self.transport.is_closing():
            self._refuse("headers_too_large")  # the parser collects a header until its end, however far that is

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._due = self._due or self.loop.time() + self._bounds.head_s
        self._head_bytes = self._unseen_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._measure(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:  # a trailer comes too late to be a header
            super().on_header(name, value)
        self._measure(len(name) + len(value) + len(": \r\n"))

    def _measure(self, size: int) -> None:
        self._unseen_bytes = 0
        self._head_bytes += size
        if self._head_bytes > self._bounds.head_bytes or len(self.headers) > self._bounds.headers:
            self._refusal = "headers_too_large"
            raise OverflowError  # ends the parsing; uvicorn then asks for a 400 response

    @property
    def is_offered_upgrade(self) -> bool:
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def head_without_upgrade(self) -> bytes:
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([first, *lines, b"", b""])

    def on_headers_complete(self) -> None:
        if self.is_offered_upgrade:
            return
        self._is_in_body = True
        self._due = self.loop.time() + self._bounds.body_s
        super().on_headers_complete()
        if len(self.pipeline) > self._bounds.pipelined:
            raise OverflowError
        if self.pipeline:
            self.flow.resume_reading()  # or nobody would see that the client leaves

    def on_body(self, body: bytes) -> None:
        self._unseen_bytes = 0
        super().on_body(body)
        if self.pipeline and self.flow.read_paused:
            raise OverflowError  # more than may wait behind an answer

    def on_message_complete(self) -> None:
        if self.is_offered_upgrade:
            return
        self._is_in_body = False
        self._due = None if self._is_answering else self.loop.time() + self._bounds.head_s  # answered before it came
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cycle = self._answering  # type: ignore[assignment]  # uvicorn tells the last one, which may wait still
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self._due is not None and not self._is_in_body:
            self._due = self.loop.time() + self._bounds.head_s  # nobody listened before
        super().on_response_complete()
        if self._due is not None:  # the next request has begun: it has its own time
            self._unset_keepalive_if_required()

    def look(self) -> None:
        """Ends what has taken too long; called about once a second."""
        now = self.loop.time()
        if self._has_stalled(now):
            self.transport.abort()  # closing would wait for the very bytes that do not leave
        elif self._due is not None and now > self._due and not self._is_answering and not self.transport.is_closing():
            if self._is_in_body or self.scope is None:
                self.transport.close()  # answered long ago; or a browser that had only kept a connection ready
            else:
                self._refuse("request_timeout")

    @property
    def _is_answering(self) -> bool:
        """Then lateness is the application's to judge, or to ignore."""
        return self.cycle is not None and not self.cycle.response_complete

    def _has_stalled(self, now: float) -> bool:
        sent, is_waiting = self.transport.sent, self.transport.get_write_buffer_size() > 0
        if sent != self._sent or not is_waiting:
            self._sent, self._sent_at = sent, now
        return now - self._sent_at > self._bounds.stalled_s

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, code: str) -> None:
        if self._answering is not None and self._answering.response_started and not self._answering.response_complete:
            self.transport.abort()  # an answer is on its way, and these words would stand in the middle of it
            return
        request_id = secrets.token_hex(8)
        response = ApiError(code).response(request_id)
        response.headers.update({**COMMON_HEADERS, "X-Request-Id": request_id, "Connection": "close"})
        headers = [*self.server_state.default_headers, *response.raw_headers]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        log_event("request", id=request_id, status=response.status_code, code=code)  # no application sees it
        self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + bytes(response.body))
        self.transport.close()
