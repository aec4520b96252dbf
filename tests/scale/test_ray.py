"""Two replicas on a real Ray keep the promises of one process, also when one of them is killed or told to end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.monitoring import Prometheus
from tests.scale.cluster import Cluster, Replica, cpu_seconds
from tests.scale.conftest import QUEUE, SLOTS
from tests.service.crowd import Told, ask, at_once, narrow_connection, request, say
from tests.service.serving import FOR_EVER, Server, wait_until

pytestmark = pytest.mark.ray

STREAMS = 50


def left_of_clusters() -> set[Path]:
    """Their folders, and /proc/PID of Ray's own programs in one of them."""
    told = {path.parent: content(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    programs = {program for program, line in told.items() if re.search(rb"/tmp/ray-\w+/session_", line)}
    return programs | set(Path("/tmp").glob("ray-*"))


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def test_a_cluster_that_is_late_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = left_of_clusters()
    monkeypatch.setattr("tests.scale.cluster.PATIENCE_S", 2.0)
    with pytest.raises(AssertionError):
        Cluster(tmp_path)
    wait_until(lambda: left_of_clusters() <= before)


def body(seed: int, max_new_tokens: int = 200) -> dict[str, Any]:
    """Log probabilities too: they would tell of the last bit."""
    return {"prompt": "ROMEO:", "seed": seed, "max_new_tokens": max_new_tokens, "temperature": 1.2, "logprobs": 1}


@dataclass
class Whole:
    """A text over as many connections as it took."""

    tokens: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    end: tuple[str, dict[str, Any]] | None = None
    now: Told = field(default_factory=Told)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + len(self.now.arrived)

    async def read(self, port: int, asked: dict[str, Any]) -> Whole:
        """A client that goes on until the end: what Ray's proxy tells of a dead replica is a 500 or a broken stream."""
        last_event_id = None
        while self.end is None:
            self.connections += 1
            told = await ask(port, asked, last_event_id=last_event_id, leave=self._listen)
            assert told.status in (0, 200, 500), told.content
            if told.status == 200:
                self.tokens += told.tokens
                last_event_id = told.last_event_id or last_event_id
                self.end = told.ends[0] if told.ends else None
            self.now = Told()
            await asyncio.sleep(0 if self.end else 0.2)
        return self

    def _listen(self, told: Told) -> bool:
        self.now = told
        return False


async def texts_of(port: int, seeds: range) -> list[list[dict[str, Any]]]:
    return [told.tokens for told in await at_once(ask(port, body(seed, 400)) for seed in seeds)]


async def crowd(port: int, seeds: range) -> list[asyncio.Task[Whole]]:
    """Streams that all flow when this returns. They come within a second: Ray would give a salvo to one replica."""
    wholes, tasks = [Whole() for _ in seeds], []
    for each, seed in zip(wholes, seeds, strict=True):
        tasks.append(asyncio.create_task(each.read(port, body(seed, 400))))
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        while not all(each.num_tokens >= 10 for each in wholes):
            await asyncio.sleep(0.01)
    return tasks


def running(replica: Replica) -> int:
    return int(replica.metrics().total("requests_running"))


def test_a_replica_is_killed_and_no_letter_of_fifty_streams_is_lost_doubled_or_different(
    replicas: Cluster, plain: Server
) -> None:
    expected = asyncio.run(texts_of(plain.port, range(STREAMS)))

    async def kill_one() -> tuple[list[Whole], int, int]:
        tasks = await crowd(replicas.port, range(STREAMS))
        victim, other = replicas.replicas
        held, others = await asyncio.gather(*(asyncio.to_thread(running, each) for each in (victim, other)))
        os.kill(victim.pid, signal.SIGKILL)
        return [await task for task in tasks], held, others

    wholes, held, others = asyncio.run(kill_one())
    assert held > 0
    assert others > 0
    assert [each.tokens for each in wholes] == expected
    for each in wholes:
        assert each.end is not None
        assert (each.end[0], each.end[1]["text"]) == ("done", "".join(token["text"] for token in each.tokens))
    broken = [each for each in wholes if each.connections > 1]
    assert 0 < len(broken) <= held, "the streams of the other replica were touched"


def test_sigterm_lets_a_replica_s_streams_end_and_another_takes_its_place(replicas: Cluster) -> None:
    async def end_one() -> tuple[list[Whole], int, Replica]:
        tasks = await crowd(replicas.port, range(16))
        told = replicas.replicas[0]
        held = await asyncio.to_thread(running, told)
        os.kill(told.pid, signal.SIGTERM)
        return [await task for task in tasks], held, told

    wholes, held, told = asyncio.run(end_one())
    assert held > 0
    assert [(each.connections, len(each.tokens), each.end and each.end[0]) for each in wholes] == [
        (1, 400, "done")
    ] * 16
    wait_until(lambda: not told.lives)
    assert told not in replicas.replicas, "its entry for Prometheus outlived it"
    assert told not in replicas.wait_for_replicas(2).replicas


def test_the_experts_of_all_replicas_add_up_in_a_prometheus_that_found_them_by_file(
    replicas: Cluster, plain: Server
) -> None:
    prometheus = Prometheus.in_seconds(replicas.targets.parent)
    try:
        prometheus.wait_until_ready()
        asyncio.run(at_once(ask(replicas.port, body(seed)) for seed in range(24)))
        instances = {f"127.0.0.1:{each.port}" for each in replicas.replicas}
        counted = [each.metrics().by("routed_tokens_total", "layer") for each in replicas.replicas]
        per_token = plain.client.get("/experts").json()["experts_per_token"]
        expected = {layer: sum(each[layer] for each in counted) for layer in counted[0]}
        assert all(min(each.values()) > 0 for each in counted), "one replica had nothing to do"

        def sums(metric: str) -> dict[str, float]:
            series = prometheus.query(f'sum by (layer) ({metric}{{job="moescope"}})')
            return {each["metric"]["layer"]: float(each["value"][1]) for each in series}

        wait_until(lambda: sums("moescope_routed_tokens_total") == expected)
        assert sums("moescope_expert_tokens_total") == {layer: per_token * sum_ for layer, sum_ in expected.items()}
        up = prometheus.query('up{job="moescope"} == 1')
        assert {each["metric"]["instance"] for each in up} == instances
    finally:
        prometheus.stop()


def test_who_leaves_gives_the_slot_back_also_before_the_first_token(replicas: Cluster) -> None:
    def totals(name: str, **labels: str) -> float:
        return sum(each.metrics().total(name, **labels) for each in replicas.replicas)

    before = totals("requests_total", outcome="cancelled")
    told = asyncio.run(ask(replicas.port, {"max_new_tokens": FOR_EVER}, leave=lambda told: len(told.arrived) > 5))
    assert told.status == 200
    wait_until(lambda: totals("requests_total", outcome="cancelled") == before + 1)

    async def leave_unanswered() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", replicas.port)
        writer.write(request({"max_new_tokens": FOR_EVER, "stream": False}))
        await writer.drain()
        await asyncio.to_thread(wait_until, lambda: totals("requests_running") == 1)
        writer.transport.abort()

    asyncio.run(leave_unanswered())
    wait_until(lambda: totals("requests_total", outcome="cancelled") == before + 2)
    wait_until(lambda: totals("requests_running") == 0)


def test_nobody_is_refused_while_one_replica_has_room_and_then_the_proxy_says_429(replicas: Cluster) -> None:
    room, is_over = 2 * (SLOTS + QUEUE), False

    async def fill() -> tuple[list[int], list[Told]]:
        nonlocal is_over
        asked, tasks = {"max_new_tokens": FOR_EVER, "seed": 1}, []
        for _ in range(room + SLOTS + QUEUE + 4):  # the last but four wait in the proxy
            tasks.append(asyncio.create_task(ask(replicas.port, asked, leave=lambda _: is_over)))
            await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            while sum(task.done() for task in tasks) < 4:
                await asyncio.sleep(0.05)
        held = await asyncio.gather(*(asyncio.to_thread(taken, each) for each in replicas.replicas))
        is_over = True
        refused = [task.result() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return held, refused

    held, refused = asyncio.run(fill())
    assert sum(held) == room
    for told in refused:
        assert (told.status, told.headers["retry-after"]) == (429, "5")
        assert b"backpressure" in told.content
    wait_until(lambda: sum(map(taken, replicas.replicas)) == 0)


def taken(replica: Replica) -> int:
    metrics = replica.metrics()
    return int(metrics.total("requests_running") + metrics.total("requests_queued"))


def test_refusals_and_plain_answers_are_those_of_one_process(replicas: Cluster, plain: Server) -> None:
    client = httpx.Client(base_url=replicas.url, timeout=60)
    for asked in ({"prompt": "é"}, {"prompt": 5}, {"prompt": "", "max_new_token": 3}, {"prompt": "", "top_p": 7}):
        got, wanted = (each.post("/generate", json=asked) for each in (client, plain.client))
        assert (got.status_code, without_id(got)) == (wanted.status_code, without_id(wanted))
    assert (
        client.post("/generate", content=b"x" * 70_000, headers={"Content-Type": "application/json"}).status_code == 413
    )
    assert client.get("/nowhere").status_code == 404
    assert client.get("/info", headers={"Host": "evil.example"}).status_code == 421
    answers = [each.post("/generate", json={**body(3), "stream": False}).json() for each in (client, plain.client)]
    assert answers[0]["text"] == answers[1]["text"]
    assert client.get("/info").json()["fingerprint"] == plain.client.get("/info").json()["fingerprint"]


def without_id(response: httpx.Response) -> Any:
    told = response.json()
    told["error"].pop("request_id")
    return told


def test_what_the_proxy_changes_is_what_the_page_says(replicas: Cluster) -> None:
    """docs/scale.md, "Behind Ray's proxy": when one of these fails, the page is to be mended."""
    answer = httpx.post(f"{replicas.url}/generate", json=body(1, 3), headers={"X-Request-Id": "mine"}, timeout=60)
    ids = answer.headers.get_list("x-request-id")
    assert len(ids) == 2
    assert ids[1] == answer.headers["x-client-request-id"] == "mine"
    unnamed = httpx.post(f"{replicas.url}/generate", json=body(1, 3), timeout=60)
    assert unnamed.headers.get_list("x-request-id")[1] == unnamed.headers["x-client-request-id"]
    assert httpx.get(f"{replicas.url}/-/healthz", timeout=60).text == "success"
    long_head = f"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: {'x' * 40_000}\r\n\r\n".encode()
    assert asyncio.run(say(replicas.port, long_head)).status == 200  # a 431 in one process


def test_behind_the_proxy_nobody_is_too_slow_a_reader(replicas: Cluster) -> None:
    """In one process the writing stops at 1,024 tokens that wait, and ends as stalled; Ray takes them all."""

    def ended_by_length() -> float:
        return sum(each.metrics().total("requests_total", outcome="length") for each in replicas.replicas)

    before = ended_by_length()
    with narrow_connection(replicas.port) as connection:
        connection.sendall(request({"max_new_tokens": 2500, "logprobs": 10, "return_routed_experts": True}))
        wait_until(lambda: ended_by_length() == before + 1)


def first_and_next(told: Told, asked_at: float) -> tuple[float, float]:
    """Milliseconds to the first token, and from one to the next."""
    assert len(told.arrived) == 200
    return 1000 * (told.arrived[0] - asked_at), 1000 * (told.arrived[-1] - told.arrived[0]) / 199


def test_what_the_proxy_costs_is_printed(replicas: Cluster, plain: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved, medians of one stream, processor time of sixteen; all to be asserted is that there are figures."""
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ray": []}

    async def measure() -> None:
        for _ in range(7):
            for name, port in (("plain", plain.port), ("ray", replicas.port)):
                asked_at = time.monotonic()
                times[name].append(first_and_next(await ask(port, body(5)), asked_at))

    asyncio.run(measure())
    cpu = {"plain": cpu_of_a_token(plain.port, lambda: plain.cpu_seconds)}
    writers = [each.pid for each in replicas.replicas]
    cpu["ray"] = cpu_of_a_token(replicas.port, lambda: sum(map(cpu_seconds, writers)))
    proxy = cpu_of_a_token(replicas.port, replicas.proxy_cpu_seconds)
    with capsys.disabled():
        for name, each in times.items():
            first, following = (statistics.median(column) for column in zip(*each, strict=True))
            print(
                f"\n{name:>6}: first token {first:.2f} ms, next {following:.3f} ms, cpu a token {cpu[name]:.3f} ms",
                end="",
            )
        print(f" and {proxy:.3f} ms in the proxy")
    assert all(first > 0 < following for each in times.values() for first, following in each)
    assert proxy > 0


def cpu_of_a_token(port: int, seconds: Callable[[], float]) -> float:
    """Milliseconds of processor time for each token of sixteen streams."""
    before = seconds()
    told = asyncio.run(at_once(ask(port, body(seed)) for seed in range(16)))
    return 1000 * (seconds() - before) / sum(len(each.arrived) for each in told)
