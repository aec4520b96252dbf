"""Wraps every request: an id, the headers every answer has, one log line, and an answer even when the code is wrong.

Pure ASGI: middleware that buffers would take streaming and the sight of a closed connection from the routes.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError
from service.logs import log_event

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
COMMON_HEADERS: Final = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MAX_CLIENT_ID: Final = 128
MAX_LOGGED_PATH: Final = 200
_RAW_HEADERS: Final = [(name.lower().encode(), value.encode()) for name, value in COMMON_HEADERS.items()]
_ABOUT_PARTS: Final = frozenset({b"range", b"if-range"})  # files come whole; starlette's refusals are not ours
_NOT_FOR_AN_ID: Final = re.compile(r"[^A-Za-z0-9._:+/=-]")


class RequestScope:
    """The outermost layer of ours. Sets ``request.state.request_id``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, send)
        inner = dict(scope)
        inner["headers"] = [header for header in scope["headers"] if header[0] not in _ABOUT_PARTS]
        if scope["method"] == "HEAD":
            inner["method"] = "GET"  # to everything within; the server leaves the body out
        if scope["path"].endswith(("/.", "/..")):
            inner["path"] += "/"  # or the page's files redirect there, to the address that the client's Host names
        try:
            await self._app(inner, receive, call.send)
        except Exception as error:
            await call.fail(error, receive)
        finally:
            call.log()


class _Call:
    """One request and its answer, as seen from outside."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        self._status = 0
        self._id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = self._id
        self._client_id = _NOT_FOR_AN_ID.sub("", Headers(scope=scope).get("x-request-id", "")[:MAX_CLIENT_ID])

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            present = {name for name, _ in message["headers"]}
            missing = [header for header in self._headers() if header[0] not in present]
            message = {**message, "headers": [*message["headers"], *missing]}
        await self._send(message)

    def _headers(self) -> Iterable[tuple[bytes, bytes]]:
        yield from _RAW_HEADERS
        yield b"x-request-id", self._id.encode()
        if self._client_id:
            yield b"x-client-request-id", self._client_id.encode()

    async def fail(self, error: Exception, receive: Receive) -> None:
        """A bug of ours: the log gets the traceback, the client an id to ask us about."""
        log_event("failed", logging.ERROR, exc_info=error, id=self._id, path=self._scope["path"][:MAX_LOGGED_PATH])
        if not self._status:
            await ApiError("internal").response(self._id)(self._scope, receive, self.send)

    def log(self) -> None:
        """What went well is routine; a generation has a line of its own, with more in it."""
        log_event(
            "request",
            logging.DEBUG if self._status < 400 else logging.INFO,
            id=self._id,
            method=self._scope["method"],
            path=self._scope["path"][:MAX_LOGGED_PATH],
            status=self._status,
            seconds=round(time.monotonic() - self._began, 4),
        )
