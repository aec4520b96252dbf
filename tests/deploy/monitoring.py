"""A real Prometheus: on the shipped files where docker-compose.yml puts them, or on the shipped rules in seconds."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.service.serving import free_port, wait_until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
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


def binary(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on this machine (Debian: apt install --no-install-recommends prometheus)")
    return path


def shortened(rules: str) -> str:
    """The shipped file with every range and every ``for`` of N minutes made one of N seconds; nothing else differs.

    The names of recording rules keep their 5m, which begins no word.
    """
    return re.sub(r"\b([0-9]+)m\b", r"\1s", rules)


class Prometheus:
    """The process and its HTTP API. Its data lie in a new folder."""

    def __init__(self, folder: Path, address: str, command: Sequence[str]) -> None:
        self._log = folder / "prometheus.log"
        storage = [f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
        with self._log.open("w") as file:
            self._process = subprocess.Popen([*command, *storage], stdout=file, stderr=file)
        self._client = httpx.Client(base_url=f"http://{address}", timeout=60)

    @classmethod
    def of_compose(cls, folder: Path, addresses: Addresses) -> Self:
        """On the shipped files, unedited, under the names and with the flags that docker-compose.yml gives."""
        flags = [flag for flag in COMPOSE["services"]["prometheus"]["command"] if "storage.tsdb.path" not in flag]
        mounts = {addresses.hosts: "/etc/hosts", FOLDER: "/etc/prometheus"}
        address = f"{addresses.of['prometheus']}:{free_port()}"  # nobody but the test asks it
        return cls(folder, address, inside(binary("prometheus"), *flags, mounts=mounts))

    @classmethod
    def in_seconds(cls, folder: Path, target: str | None = None) -> Self:
        """On the shipped files with seconds for minutes; its targets lie in ``targets`` there, this one among them."""
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
        (folder / "targets").mkdir(parents=True, exist_ok=True)
        if target:
            (folder / "targets" / "one.json").write_text(json.dumps([{"targets": [target]}]))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(shortened((FOLDER / "rules.yml").read_text()))
        command = [binary("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        return cls(folder, f"127.0.0.1:{free_port()}", command)

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

    def has_fired(self, name: str, **labels: object) -> bool:
        """At any time until now."""
        wanted = "".join(f',{label}="{value}"' for label, value in labels.items())
        return bool(self.query(f'max_over_time(ALERTS{{alertname="{name}",alertstate="firing"{wanted}}}[1h])'))

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
