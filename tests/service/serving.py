"""A real `python -m service` to talk to, and what its clients need. Knows the wire, nothing of the code behind it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
FOR_EVER = 1_000_000

Event = tuple[str, dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(*flags: object, module: str = "service") -> list[str]:
    return [sys.executable, "-m", module, *map(str, flags)]


def run_to_the_end(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """For what is refused at once."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MOESCOPE_")}
    return subprocess.run(
        command(*flags), cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


class Service:
    """What listens on a port, and how it is asked."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.url = f"http://{host}:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def generate(self, prompt: str = "ROMEO:", **body: object) -> httpx.Response:
        return self.client.post("/generate", json={"prompt": prompt, **body})

    def send(self, **body: object) -> socket.socket:
        """A request whose answer nobody has read yet; closing the connection is leaving."""
        content = json.dumps({"prompt": "", **body}).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def answer(self, prompt: str = "ROMEO:", **body: object) -> dict[str, Any]:
        """What ``"stream": false`` answers."""
        response = self.generate(prompt, stream=False, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, prompt: str = "ROMEO:", **body: object) -> list[Event]:
        response = self.generate(prompt, **body)
        assert response.status_code == 200, response.text
        return parse_events(response.iter_lines())

    def metrics(self) -> "Samples":
        return Samples.parse(self.client.get("/metrics").text)

    def wait_for(self, **gauges: float) -> None:
        """Until the gauges ``moescope_<name>`` have these values."""
        wait_until(lambda: all(self.metrics().total(name) == value for name, value in gauges.items()))


class Server(Service):
    """The process. Its log goes to a file, so that it never waits for a reader."""

    def __init__(
        self,
        log: Path,
        *flags: object,
        stdout: int | IO[str] = subprocess.PIPE,
        port: int | None = None,
        module: str = "service",
        host: str = "127.0.0.1",
    ) -> None:
        super().__init__(port or free_port(), host)
        self._log = log
        where = ("--host", host, "--port", self.port)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command(*where, *flags, module=module), cwd=ROOT, stdout=stdout, stderr=file, text=True
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> Self:
        assert self.process.stdout is not None
        impatience = threading.Timer(PATIENCE_S, self.process.kill)
        impatience.start()
        first_line = self.process.stdout.readline()
        impatience.cancel()
        assert first_line.startswith("Moescope is ready"), self.log
        return self

    def wait_until_it_listens(self) -> Self:
        wait_until(self._accepts)
        return self

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """At once. Tests of how it ends when it is told to send the signal themselves."""
        self.client.close()
        self.process.kill()
        self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    @property
    def own_memory(self) -> int:
        """Bytes of RssAnon and VmSwap: what it holds that is in no file."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * sum(int(size) for size in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))

    @property
    def threads(self) -> list[int]:
        return [int(task.name) for task in Path(f"/proc/{self.process.pid}/task").iterdir()]

    @property
    def cpu_seconds(self) -> float:
        """All its threads have used so far."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # clock_getcpuclockid(3): /proc counts in 10 ms only


@dataclass(frozen=True)
class Samples:
    """One scrape: value by name and labels."""

    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def parse(cls, text: str) -> "Samples":
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        return cls({(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples})

    def total(self, name: str, **labels: object) -> float:
        """Sum over all series of ``moescope_<name>`` that have these labels."""
        return sum(self._matching(name, labels).values())

    def by(self, name: str, label: str, **labels: object) -> dict[str, float]:
        """The same for each value of one label."""
        sums: defaultdict[str, float] = defaultdict(float)
        for series, value in self._matching(name, labels).items():
            sums[dict(series)[label]] += value
        return dict(sums)

    def _matching(self, name: str, labels: dict[str, object]) -> dict[frozenset[tuple[str, str]], float]:
        wanted = {(label, str(value)) for label, value in labels.items()}
        named = {series: value for (each, series), value in self.values.items() if each == f"moescope_{name}"}
        assert named, f"there is no moescope_{name}"
        return {series: value for series, value in named.items() if wanted <= series}


def parse_events(lines: Iterable[str]) -> list[Event]:
    """The whole of a stream. Fails on anything that is not an event of exactly three lines, or a comment."""
    events: list[Event] = []
    name = None
    for line in lines:
        if line.startswith("id: "):
            assert name is None
            assert re.fullmatch(r"[0-9a-f]{12}:(-1|\d+)", line.removeprefix("id: "))
        elif line.startswith("event: "):
            assert name is None
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            assert name is not None
            events.append((name, json.loads(line.removeprefix("data: "))))
            name = None
        else:
            assert line == "" or line.startswith(":"), line
    return events


def wait_until(holds: Callable[[], bool]) -> None:
    """Polls a condition that has to come true; it is the deadline, not a pause, that decides."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
