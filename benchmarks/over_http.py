"""A server under load: one of our own or any other. Knows its address, its CPU time and what its clients see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.workload import Workload


class NoServer(Exception):
    """There is nothing to measure."""


@dataclass(frozen=True)
class HttpTrial:
    """One closed loop as its clients saw it. server_cpu_seconds is None for a server that is not ours."""

    answers: list[client.Answer]
    client_cpu_seconds: float
    server_cpu_seconds: float | None

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_times) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """From the first request to the last end, like the engine's."""
        began = min(answer.sent_at for answer in self.answers)
        return self.tokens / (max(answer.ended_at for answer in self.answers) - began)


class Target:
    """A running server. Raises OSError when there is none."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self._url = url.rstrip("/")
        self._pid = pid
        with urllib.request.urlopen(f"{self._url}/info", timeout=client.PATIENCE_S) as response:
            self.info: dict[str, Any] = json.load(response)

    def trial(self, workload: Workload, streams: int) -> HttpTrial:
        """Raises BrokenAnswer, OSError."""
        vocabulary = self.info["vocabulary"]
        client.closed_loop(self._url, workload.warm_up().queues(vocabulary, streams))
        queues = workload.queues(vocabulary, streams)
        own, server = time.process_time(), self._cpu_seconds()
        answers = client.closed_loop(self._url, queues)
        return HttpTrial(answers, time.process_time() - own, self._cpu_seconds() - server if self._pid else None)

    def _cpu_seconds(self) -> float:
        """Of all threads of the process since it began."""
        if self._pid is None:
            return 0.0
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


@contextmanager
def server_process(checkpoint: Path, slots: int, threads: int) -> Iterator[Target]:
    """Raises NoServer when it does not start; it has said why."""
    flags = ("--port", 0, "--checkpoint", checkpoint, "--slots", slots, "--threads", threads, "--log-level", "warning")
    command = [sys.executable, "-m", "service", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            _, is_ready, url = process.stdout.readline().partition("is ready: ")
            if not is_ready:
                raise NoServer("the server did not start")
            yield Target(url.strip(), process.pid)
        finally:
            process.terminate()
