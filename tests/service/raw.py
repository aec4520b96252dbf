"""HTTP over a plain socket, for what no client would send."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import httpx

HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def read_response(connection: socket.socket) -> httpx.Response:
    head, _, content = connection.makefile("rb").read().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return httpx.Response(int(first.split()[1]), headers=[_pair(line) for line in lines], content=content)


def received(connection: socket.socket) -> bytes:
    """Until the end, or until the server resets a connection on which more is being sent."""
    content = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            content += chunk
    return content


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value


def code_of(response: httpx.Response) -> str:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return str(error["code"])
