"""A load client that leaves the cores to the server: one thread, sockets kept alive, events counted by searching bytes.

Knows as much of HTTP as the servers' answers need. What it counts is compared with what every answer says at its end,
so a proxy that cuts chunks inside an event is noticed, but cannot be measured.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from benchmarks.record import Trouble
from benchmarks.workload import Request

PATIENCE_S = 60.0
END = b"\r\n0\r\n\r\n"
TAIL = 8192  # bytes of an answer's end, in which its usage is told


@dataclass(frozen=True)
class Dialect:
    """How a server is asked, and what of an answer's bytes is a token, an empty one that is none, and the token count.

    JSON escapes newlines and quotes, so no mark can be part of a text.
    """

    path: str
    body: Callable[[Request], dict[str, Any]]
    token: bytes
    no_token: bytes
    done: bytes
    usage: re.Pattern[bytes]


def _ours(request: Request) -> dict[str, Any]:
    return {"prompt": request.prompt, "seed": request.seed, "max_new_tokens": request.new_tokens}


MOESCOPE = Dialect(
    "/generate",
    _ours,
    token=b"event: token\n",
    no_token=b"event: token\n\n",
    done=b"event: done\n",
    usage=re.compile(rb'"generated_tokens":(\d+)'),
)


def openai(model: str, **more: Any) -> Dialect:
    """The completions of OpenAI's API, which all servers speak; more is what only this server is told."""

    def body(request: Request) -> dict[str, Any]:
        options = {"temperature": 0.8, "stream": True, "stream_options": {"include_usage": True}, **more}
        return {"model": model, "prompt": request.prompt, "max_tokens": request.new_tokens, **options}

    usage = re.compile(rb'"completion_tokens":\s*(\d+)')
    return Dialect("/v1/completions", body, b'"text":"', b'"text":""', b"data: [DONE]\n", usage)


class BrokenAnswer(Trouble):
    """The server did not answer what was asked."""


@dataclass
class Answer:
    """When a request was sent, when each of its tokens arrived and when it ended, in time.perf_counter seconds."""

    sent_at: float
    token_times: list[float] = field(default_factory=list)
    ended_at: float = 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next; 0 between those that arrived together."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]


class Stream:
    """One connection and the requests it sends, one after the other."""

    def __init__(self, url: str, requests: list[Request], dialect: Dialect) -> None:
        parts = urlsplit(url)
        self.answers: list[Answer] = []
        self._address = (parts.hostname, parts.port or 80)
        self.socket = socket.create_connection(self._address, PATIENCE_S)
        self._is_fresh = True
        self._dialect = dialect
        path = parts.path + dialect.path
        self._waiting = [(encode(dialect.body(each), parts.netloc, path), each.new_tokens) for each in requests]

    def send_next(self) -> bool:
        """False when there is nothing left to send."""
        if self._waiting:
            self._content, self._asked = self._waiting.pop(0)
            self._line, self._tail = b"", b""
            self.answers.append(Answer(time.perf_counter()))
            try:
                self.socket.sendall(self._content)
            except ConnectionError:
                self._connect_anew()
            return True
        return False

    def _connect_anew(self) -> None:
        """For a server that closes a connection after an answer: what it costs is part of its next answer's time."""
        self.socket.close()
        self.socket = socket.create_connection(self._address, PATIENCE_S)
        self._is_fresh = True
        self.socket.sendall(self._content)

    def receive(self) -> bool:
        """Take in what has arrived. True when the answer is complete. Raises BrokenAnswer."""
        try:
            arrived = self.socket.recv(1 << 16)
        except ConnectionResetError:
            arrived = b""
        now = time.perf_counter()
        if not arrived and not (self._is_fresh or self._line or self._tail):
            self._connect_anew()
            return False
        self._is_fresh = False
        if not arrived or (arrived.startswith(b"HTTP/1.1") and not arrived.startswith(b"HTTP/1.1 200")):
            raise BrokenAnswer(arrived.decode(errors="replace") or "the server closed the connection")
        lines, newline, self._line = (self._line + arrived).rpartition(b"\n")
        lines += newline
        answer, dialect = self.answers[-1], self._dialect
        answer.token_times += [now] * (lines.count(dialect.token) - lines.count(dialect.no_token))
        self._tail = (self._tail + lines)[-TAIL:]
        if self._line or not self._tail.endswith(END):
            return False
        answer.ended_at = now
        self._check(answer)
        return True

    def _check(self, answer: Answer) -> None:
        """Does the count agree with what the server says, and with what was asked?

        A server that puts several tokens into one event is believed: they arrived together.
        """
        told = self._dialect.usage.findall(self._tail)
        if self._dialect.done not in self._tail or not told:
            raise BrokenAnswer(self._tail.decode(errors="replace"))
        counted, sent = len(answer.token_times), int(told[-1])
        if not counted <= sent == self._asked or counted == 0:
            raise BrokenAnswer(f"{counted} tokens counted, {sent} sent, {self._asked} asked for")
        answer.token_times += answer.token_times[-1:] * (sent - counted)


def encode(body: dict[str, Any], host: str, path: str) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def closed_loop(url: str, queues: list[list[Request]], dialect: Dialect = MOESCOPE) -> list[Answer]:
    """All answers to all requests, one connection for each queue. Raises BrokenAnswer, OSError."""
    streams = [Stream(url, queue, dialect) for queue in queues]
    try:
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream.socket, selectors.EVENT_READ, stream)
                stream.send_next()
            while selector.get_map():
                _read_the_ready(selector)
    finally:
        for stream in streams:
            stream.socket.close()
    return [answer for stream in streams for answer in stream.answers]


def _read_the_ready(selector: selectors.BaseSelector) -> None:
    ready = selector.select(PATIENCE_S)
    if not ready:
        raise BrokenAnswer(f"nothing arrived for {PATIENCE_S:.0f} seconds")
    for key, _ in ready:
        stream: Stream = key.data
        has_more = not stream.receive() or stream.send_next()
        if stream.socket is not key.fileobj or not has_more:
            selector.unregister(key.fileobj)
        if stream.socket is not key.fileobj and has_more:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
