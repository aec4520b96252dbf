"""A load client that leaves the cores to the server: one thread, sockets kept alive, events counted by searching bytes.

Knows as much of HTTP as Moescope's answers need. What it counts is compared with what every answer says at its end, so
a proxy that cuts chunks inside an event is noticed, but cannot be measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from benchmarks.workload import Request

PATIENCE_S = 60.0
# JSON escapes newlines, so none of these can be part of a text.
TOKEN, DONE, END = b"event: token\n", b"event: done\n", b"\r\n0\r\n\r\n"
KEPT = len(TOKEN) - 1  # of what has been searched: enough for a marker that is cut in two, too little to count it twice


class BrokenAnswer(Exception):
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

    def __init__(self, url: str, requests: list[Request]) -> None:
        parts = urlsplit(url)
        self.answers: list[Answer] = []
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), PATIENCE_S)
        self._waiting = [(encode(request, parts.netloc, parts.path), request.new_tokens) for request in requests]

    def send_next(self) -> bool:
        """False when there is nothing left to send."""
        if self._waiting:
            content, self._asked = self._waiting.pop(0)
            self._rest = b""
            self.answers.append(Answer(time.perf_counter()))
            self.socket.sendall(content)
            return True
        return False

    def receive(self) -> bool:
        """Take in what has arrived. True when the answer is complete. Raises BrokenAnswer."""
        arrived = self.socket.recv(1 << 16)
        now = time.perf_counter()
        if not arrived or (arrived.startswith(b"HTTP/1.1") and not arrived.startswith(b"HTTP/1.1 200")):
            raise BrokenAnswer(arrived.decode(errors="replace") or "the server closed the connection")
        data = self._rest + arrived
        answer = self.answers[-1]
        answer.token_times += [now] * data.count(TOKEN)
        done = data.find(DONE)
        self._rest = data[done:] if done >= 0 else data[-KEPT:]
        if not data.endswith(END):
            return False
        answer.ended_at = now
        self._check(data, len(answer.token_times))
        return True

    def _check(self, end: bytes, counted: int) -> None:
        """Does the count agree with what the server says, and with what was asked?"""
        if not self._rest.startswith(DONE):
            raise BrokenAnswer(end.decode(errors="replace"))
        usage = json.loads(self._rest.splitlines()[1].removeprefix(b"data: "))["usage"]
        if not counted == usage["generated_tokens"] == self._asked:
            raise BrokenAnswer(f"{counted} tokens counted, {usage['generated_tokens']} sent, {self._asked} asked for")


def encode(request: Request, host: str, path: str) -> bytes:
    body = {"prompt": request.prompt, "seed": request.seed, "max_new_tokens": request.new_tokens}
    content = json.dumps(body).encode()
    head = f"POST {path}/generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def closed_loop(url: str, queues: list[list[Request]]) -> list[Answer]:
    """All answers to all requests, one connection for each queue. Raises BrokenAnswer, OSError."""
    streams = [Stream(url, queue) for queue in queues]
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
        if stream.receive() and not stream.send_next():
            selector.unregister(stream.socket)
