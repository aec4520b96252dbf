"""A real Prometheus that applies the shipped rules to a server of a test's own, in seconds instead of minutes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.service.serving import ROOT, free_port, wait_until

FOLDER = ROOT / "deploy" / "prometheus"
SECONDS_FOR_A_MINUTE = 2


def binary(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on this machine (Debian: apt install --no-install-recommends prometheus)")
    return path


def shortened(rules: str) -> str:
    """The shipped file with every range and every ``for`` of N minutes made one of 2N seconds; nothing else differs.

    The names of recording rules keep their 5m, which begins no word.
    """
    return re.sub(r"\b([0-9]+)m\b", lambda match: f"{int(match[1]) * SECONDS_FOR_A_MINUTE}s", rules)


class Prometheus:
    """The process, with its configuration and data in a new folder."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(shortened((FOLDER / "rules.yml").read_text()))
        address = f"127.0.0.1:{free_port()}"
        flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._log = folder / "log"
        with self._log.open("w") as file:
            command = [binary("prometheus"), *flags, f"--web.listen-address={address}"]
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        self._client = httpx.Client(base_url=f"http://{address}", timeout=60)

    def wait_until_ready(self) -> Self:
        wait_until(self._is_ready)
        return self

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = self._client.post("/api/v1/query", data={"query": expr}).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def has_fired(self, name: str, **labels: object) -> bool:
        """At any time until now."""
        wanted = "".join(f',{label}="{value}"' for label, value in labels.items())
        return bool(self.query(f'max_over_time(ALERTS{{alertname="{name}",alertstate="firing"{wanted}}}[1h])'))

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
