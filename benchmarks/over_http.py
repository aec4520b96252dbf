"""A server under load: one of our own or any other. Knows its address, its CPU time and what its clients see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.record import Trouble, clocks
from benchmarks.workload import Workload

ENDING_S = 30.0


class NoServer(Trouble):
    """There is nothing to measure."""


@dataclass(frozen=True)
class HttpTrial:
    """One closed loop as its clients saw it, and the CPU of clients, server and all the machine's other processes."""

    answers: list[client.Answer]
    client_cpu_seconds: float
    server_cpu_seconds: float
    others_cpu_seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_times) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def seconds(self) -> float:
        """From the first request to the last end, like the engine's."""
        return max(answer.ended_at for answer in self.answers) - min(answer.sent_at for answer in self.answers)


class Target:
    """A server of ours that is running."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url.rstrip("/"), pid
        with urllib.request.urlopen(f"{self.url}/info", timeout=client.PATIENCE_S) as response:
            self.info: dict[str, Any] = json.load(response)

    def trial(self, workload: Workload, streams: int) -> HttpTrial:
        """Raises BrokenAnswer, OSError."""
        return measure(self.url, workload, streams, self.info["vocabulary"], client.MOESCOPE, self.pid)


def measure(
    url: str, workload: Workload, streams: int, vocabulary: Sequence[str], dialect: client.Dialect, pid: int
) -> HttpTrial:
    """One closed loop on a server that has been warmed up. Raises BrokenAnswer, OSError."""
    client.closed_loop(url, workload.warm_up().queues(vocabulary, streams), dialect)
    queues = workload.queues(vocabulary, streams)
    before = _cpu_clocks(pid)
    answers = client.closed_loop(url, queues, dialect)
    own, server, everybody = (now - then for now, then in zip(_cpu_clocks(pid), before, strict=True))
    return HttpTrial(answers, own, server, everybody - own - server)


def _cpu_clocks(pid: int) -> tuple[float, float, float]:
    """Seconds of this process, of the server and of all processes on the machine."""
    _, everybody, _ = clocks()
    return time.process_time(), cpu_seconds(pid), everybody


def cpu_seconds(pid: int) -> float:
    """Of all threads of the process and its children since it began."""
    ticks = 0
    for each in family(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return float(ticks / os.sysconf("SC_CLK_TCK"))


def peak_mib(pid: int) -> float:
    """The most memory that the process and its children have had, in MiB, if they all had it at the same time."""
    lines = [line for each in family(pid) for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(each for task in tasks for child in task.read_text().split() for each in family(int(child)))]


@contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is told to end; what has not ended in time, and what it leaves behind, is killed."""
    with subprocess.Popen(list(map(str, command)), text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S)
            finally:  # a second Ctrl-C ends the waiting
                with suppress(ProcessLookupError):  # all gone
                    os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def server_process(checkpoint: Path, slots: int, threads: int, runner: str = "auto") -> Iterator[Target]:
    """Raises NoServer when it does not start; it has said why."""
    sizes = ("--slots", slots, "--threads", threads)
    flags = ("--port", 0, "--checkpoint", checkpoint, *sizes, "--runner", runner, "--log-level", "warning")
    command = [sys.executable, "-m", "service", *flags]
    with started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        _, is_ready, url = process.stdout.readline().partition("is ready: ")
        if not is_ready:
            raise NoServer("the server did not start")
        yield Target(url.strip(), process.pid)
