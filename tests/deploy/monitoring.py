"""A real Prometheus on the shipped configuration, with every file and host name where docker-compose.yml puts it."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.service.serving import free_port, wait_until

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

Series = list[dict[str, Any]]


class Addresses:
    """A loopback address of its own for every service of docker-compose.yml, so that each has the port it has there.

    Nobody else on this machine sees the names: they stand in a hosts file that only the programs started here have.
    """

    def __init__(self, folder: Path) -> None:
        network = f"127.{random.SystemRandom().randint(1, 250)}.{random.SystemRandom().randint(1, 250)}"
        self.of = {name: f"{network}.{number}" for number, name in enumerate(COMPOSE["services"], start=1)}
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in self.of.items()))


def inside(*command: str, mounts: dict[Path, str]) -> list[str]:
    """The command in a mount namespace of its own, in which other files lie at known places. Needs Linux; skips."""
    script = "".join(f'mount --bind "{source}" "{target}" && ' for source, target in mounts.items()) + 'exec "$@"'
    for namespace in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        prefix = [*namespace, "sh", "-c", script, "sh"]
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return [*prefix, *command]
    pytest.skip("no mount namespace for this user, or nothing at " + ", ".join(mounts.values()))


class Prometheus:
    """The process and its HTTP API. Its data lie in a new folder."""

    def __init__(self, folder: Path, addresses: Addresses) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            pytest.skip("no Prometheus on this machine (Debian: apt install --no-install-recommends prometheus)")
        address = f"{addresses.of['prometheus']}:{free_port()}"  # nobody but the test asks it
        given = [flag for flag in COMPOSE["services"]["prometheus"]["command"] if "storage.tsdb.path" not in flag]
        flags = [*given, f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
        mounts = {addresses.hosts: "/etc/hosts", ROOT / "deploy" / "prometheus": "/etc/prometheus"}
        self._log = folder / "prometheus.log"
        with self._log.open("w") as file:
            self._process = subprocess.Popen(inside(binary, *flags, mounts=mounts), stdout=file, stderr=file)
        self._client = httpx.Client(base_url=f"http://{address}", timeout=60)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> Self:
        wait_until(self._is_ready)
        return self

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> Series:
        """What an instant query finds now. Fails on an error, and on anything that Prometheus remarks."""
        return self._ask("/api/v1/query", query=expr)

    def query_range(self, expr: str, seconds: float, step: float) -> Series:
        now = time.time()
        return self._ask("/api/v1/query_range", query=expr, start=now - seconds, end=now, step=step)

    def _ask(self, path: str, **form: str | float) -> Series:
        answer = self._client.post(path, data=form).json()
        assert answer["status"] == "success", answer
        assert "warnings" not in answer, answer
        assert "infos" not in answer, answer
        series: Series = answer["data"]["result"]
        return series

    def stop(self) -> None:
        self._client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
