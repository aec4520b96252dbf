"""The client that keeps dashboards moving: varied, polite, brief, and content with Python alone."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.traffic import silenced, wish
from tests.checkpoints import tiny_checkpoint
from tests.service.serving import ROOT, Server, free_port, wait_until

MODEL = {"num_layers": 3, "num_experts": 4, "experts_per_token": 2}
# Without site-packages, as the script may be run by any Python.
SCRIPT = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "traffic.py")]

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Server] = []

    def start(*flags: object, port: int | None = None) -> Server:
        log = tmp_path / f"log-{len(started)}"
        started.append(Server(log, "--checkpoint", checkpoint, "--threads", 1, *flags, port=port))
        return started[-1].wait_until_ready()

    yield start
    for server in started:
        server.stop()


def run(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *map(str, flags)], env=environment, capture_output=True, text=True, timeout=100)


def outcomes(server: Server) -> dict[str, float]:
    return server.metrics().by("requests_total", "outcome")


def test_it_says_in_one_line_what_it_does_and_in_another_what_came_of_it(start: Start) -> None:
    server = start()
    ran = run("--url", server.url, "--seconds", 3, "--people", 8)
    assert (ran.returncode, ran.stderr) == (0, "")
    first, last = ran.stdout.splitlines()
    assert first.startswith(f"8 people ask {server.url} for 3 s: ")
    assert " answered" in last
    assert "unanswered" not in last
    by_stream = server.metrics().by("requests_total", "stream")
    assert min(by_stream["true"], by_stream["false"]) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_until_it_is_told_to_stop_and_leaves_nothing_running(start: Start, number: signal.Signals) -> None:
    server = start()
    command = [*SCRIPT, "--url", server.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"4 people ask {server.url} until Ctrl-C: ")
        wait_until(lambda: outcomes(server)["length"] > 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err, len(out.splitlines())) == (0, "", 1)
    server.wait_for(requests_running=0)


def test_it_comes_back_when_the_service_does(start: Start) -> None:
    port = free_port()
    server = start(port=port)
    process = subprocess.Popen([*SCRIPT, "--url", server.url], stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: outcomes(server)["length"] > 0)
        server.stop()
        again = start(port=port)
        wait_until(lambda: outcomes(again)["length"] > 0)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_it_brings_the_key_of_its_environment(start: Start) -> None:
    server = start("--api-key", "secret")
    assert run("--url", server.url, "--seconds", 2, MOESCOPE_API_KEY="secret").returncode == 0
    refused = run("--url", server.url, "--seconds", 2)
    assert refused.returncode == 1
    assert "401" in refused.stderr


def test_it_says_in_one_line_that_nobody_is_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ran = run("--url", url)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"{url} does not answer")
    assert line.endswith("make serve")


def test_people_are_different_and_the_same_seed_is_the_same_people() -> None:
    def wishes(seed: int) -> list[dict[str, object]]:
        chance = random.Random(seed)
        return [wish(chance, MODEL) for _ in range(500)]

    assert wishes(1) == wishes(1) != wishes(2)
    for field in ("prompt", "max_new_tokens", "temperature", "seed", "stream"):
        assert len({each[field] for each in wishes(1)}) > 1, field
    assert 0 < sum("disabled_experts" in each for each in wishes(1)) < 250
    assert 0 < sum(each["temperature"] == -1 for each in wishes(1)) < 50


def test_every_wish_but_the_deliberate_mistake_is_granted(start: Start) -> None:
    server = start()
    chance = random.Random(3)
    for body in [wish(chance, MODEL) for _ in range(100)]:
        response = server.client.post("/generate", json=body | {"max_new_tokens": 1})
        assert response.status_code == (422 if body["temperature"] == -1 else 200), response.text


def test_no_expert_is_silenced_where_all_are_needed() -> None:
    assert silenced(random.Random(0), MODEL | {"num_experts": 2}) == []
    assert all(len(silenced(random.Random(seed), MODEL)) in (1, 3) for seed in range(20))
