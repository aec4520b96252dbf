"""Who may ask: under which name, from which origin, with which key. Sees addresses and headers, never a body.

Pure ASGI, as in middleware. Everything is closed but what it is told to leave open, so that a new route is safe.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Set
from typing import Final

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError
from service.metrics import Metrics

PROBES: Final = frozenset({"/livez", "/readyz"})
METRICS_PATH: Final = "/metrics"
GENERATING: Final = frozenset({"/generate", "/v1/completions"})
ANY: Final = "*"
_BRACKETED: Final = re.compile(r"\[([^]]*)\](?::[0-9]*)?")
CROSS_ORIGIN_HEADERS: Final = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, X-Request-Id",
    "Access-Control-Expose-Headers": "X-Request-Id, X-Client-Request-Id, Retry-After",
    "Access-Control-Max-Age": "600",
}


class Hosts:
    """The names of this server. A page whose own name was pointed at us (DNS rebinding) sends that name as Host."""

    def __init__(self, listens_on: str, names: Set[str]) -> None:
        self._names = {"localhost", listens_on.lower(), *map(_name_of, names)} - {""}  # which is a missing Host
        self._allows_any = ANY in names
        # On a network the machine has addresses that only its clients know; a number cannot be rebound.
        self._allows_any_address = not _is_loopback(listens_on)

    def allow(self, host: str) -> bool:
        if self._allows_any:
            return True
        name = _without_port(host)
        return name in self._names or _is_loopback(name) or (self._allows_any_address and _is_address(name))


class Guard:
    """Refuses before anything has been read: 421 for a name that is not ours, 401 for a key that is not."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Hosts,
        key: SecretStr | None,
        open_paths: Set[str],
        has_origins: bool,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._key = key
        self._open_paths = open_paths
        self._has_origins = has_origins
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                app = self._admit(scope, Headers(scope=scope))
            except ApiError as refusal:
                app = refusal.response(scope["state"]["request_id"])
                if scope["path"] in GENERATING and scope["method"] == "POST":
                    self._metrics.record_refusal(refusal.kind.type, stream=False)  # who knows what the body asks for
        await app(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> ASGIApp:
        """Who answers. Raises ApiError: host_not_allowed, unauthorized."""
        path = scope["path"]
        named = headers.getlist("host")
        if path not in PROBES and path != METRICS_PATH and not self._hosts.allow(named[0] if len(named) == 1 else ""):
            raise ApiError("host_not_allowed")
        if self._has_origins and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return Response(status_code=204)  # a browser's question before the request; it brings no key
        if path not in self._open_paths and not self._has_key(headers.get("authorization", "")):
            raise ApiError("unauthorized")
        return self._app

    def _has_key(self, authorization: str) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(" ")
        known = self._key.get_secret_value().encode()
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode("latin-1"), known)


class CrossOrigin:
    """Lets the pages of the origins named read every answer, refusals and failures included."""

    def __init__(self, app: ASGIApp, *, origins: Set[str]) -> None:
        self._app = app
        self._origins = {origin.rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(scope, MutableHeaders(scope=message))
            await send(message)

        await self._app(scope, receive, send_allowed)

    def _add_headers(self, scope: Scope, headers: MutableHeaders) -> None:
        headers.add_vary_header("Origin")
        asked = Headers(scope=scope)
        allowed = self._origins & {asked.get("origin", ""), ANY}
        if allowed:
            headers.update({"Access-Control-Allow-Origin": min(allowed), **CROSS_ORIGIN_HEADERS})
            if wanted := asked.get(
                "access-control-request-headers"
            ):  # clients bring headers of their own, OpenAI's for one
                headers["Access-Control-Allow-Headers"] = wanted


def split_list(text: str) -> frozenset[str]:
    """What a comma-separated setting lists, in lower case."""
    return frozenset(item.strip().lower() for item in text.split(",") if item.strip())


def _name_of(item: str) -> str:
    """What a setting means: an IPv6 address may stand there without brackets."""
    return item if _is_address(item) else _without_port(item)


def _without_port(host: str) -> str:
    """As it is compared: lower case, without the dot of a whole name, an IPv6 address without its brackets."""
    host = host.lower()
    if not host.startswith("["):
        return host.partition(":")[0].removesuffix(".")
    match = _BRACKETED.fullmatch(host)
    return match[1] if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
