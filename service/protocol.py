"""One connection, taught its limits: what is late, too large, or never read gives its descriptor back. No routes.

uvicorn has a time limit for idle connections only: a request that comes one byte a minute, or an answer that is never
read, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.body import BODY_S
from service.errors import ApiError
from service.middleware import COMMON_HEADERS


@dataclass(frozen=True)
class Bounds:
    """Seconds for a request's head, for its body, and for an answer's bytes to move; bytes and lines of a head."""

    connections: int
    head_s: float = 10.0
    body_s: float = BODY_S
    stalled_s: float = 15.0
    head_bytes: int = 32_768
    headers: int = 100


class CountingTransport:
    """A transport that knows what has left it. The size of a buffer alone cannot tell a standstill from a balance."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    @property
    def sent(self) -> int:
        return self._written - self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """Answers what is not HTTP, and reaches no application, in the shape of all other refusals."""

    transport: CountingTransport  # type: ignore[assignment]

    def __init__(self, bounds: Bounds, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._refusal = "bad_request"
        self._due: float | None = None
        self._is_in_body = False
        self._head_bytes = 0
        self._unseen_bytes = 0
        self._sent, self._sent_at = -1, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CountingTransport(transport))  # type: ignore[arg-type]
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

    def on_headers_complete(self) -> None:
        self._is_in_body = True
        self._due = self.loop.time() + self._bounds.body_s
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unseen_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._due = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._due is not None and not self._is_in_body:
            self._due = self.loop.time() + self._bounds.head_s  # nobody listened before
        super().on_response_complete()

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
        request_id = secrets.token_hex(8)
        response = ApiError(code).response(request_id)
        response.headers.update({**COMMON_HEADERS, "X-Request-Id": request_id, "Connection": "close"})
        headers = [*self.server_state.default_headers, *response.raw_headers]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + bytes(response.body))
        self.transport.close()
