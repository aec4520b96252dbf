"""A real Ray on loopback with the service on it, started as docs/scale.md says. Without Ray it skips by name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import pytest
import yaml

from tests.service.serving import ROOT, Samples, free_port

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Replica:
    """What the name of its entry for Prometheus tells."""

    pid: int
    port: int

    def metrics(self) -> Samples:
        return Samples.parse(httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE_S).text)

    @property
    def lives(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()


class Cluster:
    """A head node and what ``serve run`` deploys on it. Its own temporary folder: sockets want short paths."""

    def __init__(self, targets: Path, **settings: object) -> None:
        if importlib.util.find_spec("ray") is None:
            pytest.skip("Ray is not installed (make test-ray does it)")
        self.targets = targets
        self.port, gcs = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("MOESCOPE_")} | {
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # or whoever else is on the machine goes first
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: the node is at 127.0.0.1
        }
        head = {
            "--node-ip-address": "127.0.0.1",
            "--port": gcs,
            "--ray-client-server-port": free_port(),
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--num-cpus": 2,
            "--object-store-memory": 100_000_000,
            "--include-dashboard": "false",
            "--temp-dir": self._folder,
        }
        flags = [str(word) for flag in head.items() for word in flag]
        self._serve: subprocess.Popen[bytes] | None = None
        self._head = self._start("head", "ray.scripts.scripts", "start", "--head", "--block", *flags)
        try:
            self._deploy({"targets": str(targets), **settings})
        except BaseException:
            self.stop()  # nobody else can
            raise

    def _deploy(self, arguments: dict[str, object]) -> None:
        application = {
            "name": "moescope",
            "route_prefix": "/",
            "import_path": "service.ray_app:app",
            "args": arguments,
        }
        config = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [application]}
        (self._folder / "serve.yaml").write_text(yaml.safe_dump(config))
        self._wait(lambda: "block forever" in self.log("head"))  # until then there is nobody to connect to
        self._serve = self._start("serve", "ray.serve.scripts", "run", str(self._folder / "serve.yaml"))

    def _start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    @property
    def replicas(self) -> list[Replica]:
        """Those that say they are there; one that was killed is among them until another comes."""
        return replicas_in(self.targets)

    def wait_for_replicas(self, number: int) -> Self:
        """So many live and are ready, and Ray sends requests there."""
        self._wait(lambda: len(self.replicas) == number and all(map(_is_ready, self.replicas)) and self._answers())
        return self

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self._head.poll() is None, self.log("head")
            assert time.monotonic() < deadline, self.log("serve" if self._serve else "head")[-5000:]
            time.sleep(0.1)

    def proxy_cpu_seconds(self) -> float:
        """What Ray's proxy of this node has used so far; it is a grandchild of the head."""
        (pid,) = [pid for pid in _below(self._head.pid) if "ProxyActor" in Path(f"/proc/{pid}/cmdline").read_text()]
        return cpu_seconds(pid)

    def interrupt(self) -> None:
        """Ctrl-C where ``serve run`` was typed; returns when the service is gone."""
        assert self._serve
        self._serve.send_signal(signal.SIGINT)
        self._serve.wait(PATIENCE_S)

    def stop(self) -> None:
        """The head takes everything along, unless it is told before it is up."""
        below = _below(self._head.pid)
        self._head.send_signal(signal.SIGTERM)
        try:
            self._head.wait(60)
        finally:
            for pid in below:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in filter(None, (self._serve, self._head)):
                process.kill()
                process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)


def replicas_in(targets: Path) -> list[Replica]:
    found = [re.search(r"-(\d+)-(\d+)\.json$", path.name) for path in targets.glob("*.json")]
    return sorted((Replica(int(each[1]), int(each[2])) for each in found if each), key=lambda one: one.pid)


def _is_ready(replica: Replica) -> bool:
    try:
        return replica.lives and replica.metrics().total("ready") == 1
    except httpx.TransportError:
        return False


def _below(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []
    return children + [each for child in children for each in _below(child)]


def cpu_seconds(pid: int) -> float:
    """All threads of a process have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
