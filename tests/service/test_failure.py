"""What happens when the engine breaks, on a real process: nobody waits for ever, and nobody else's text changes."""

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service import streaming
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.crowd import Told, ask, at_once
from tests.service.serving import FOR_EVER, Server, wait_until

STREAMS = 32
STARTING = threading.Lock()  # the environment belongs to all threads


def body(seed: int, **changes: object) -> dict[str, Any]:
    return {"prompt": "ROMEO:", "seed": seed, "max_new_tokens": 120, "logprobs": 0, **changes}


def start(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, faults: str, *flags: object, module: str = "service"
) -> Server:
    with STARTING:
        monkeypatch.setenv("MOESCOPE_FAULT", faults)
        server = start_server("--slots", STREAMS, *flags, module=module)
        monkeypatch.delenv("MOESCOPE_FAULT")
    return server.wait_until_ready()


def at_steps(fault: str, count: int) -> str:
    """So many faults, each in the middle of another crowd: a crowd takes 120 to 240 steps, or it is cut short."""
    return ",".join(f"{fault}:{40 + 173 * place}" for place in range(count))


async def ended_well(port: int, seed: int) -> None:
    told = await ask(port, body(seed, max_new_tokens=3))
    assert [name for name, _ in told.ends] == ["done"]


def test_a_step_that_raises_ends_who_runs_with_one_error_and_the_next_is_served(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, at: At, evidence: Evidence
) -> None:
    places = at(3, 50)
    server = start(start_server, monkeypatch, at_steps("raise", places))
    slowest, num_errors = 0.0, 0

    async def crowds() -> None:
        nonlocal slowest, num_errors
        while server.log.count("a fault that was asked for") < places:
            answers = await at_once(ask(server.port, body(seed)) for seed in range(STREAMS))
            streams = [told for told in answers if told.status == 200]
            failed = [told for told in streams if told.ends[0][0] == "error"]
            assert {told.status for told in answers} <= {200, 500}, "who was waiting for a first token gets a status"
            assert all(len(told.ends) == 1 for told in streams)
            assert {told.ends[0][1]["code"] for told in failed} <= {"internal"}
            num_errors += len(failed) + len(answers) - len(streams)
            slowest = max([slowest, *(told.ended_at - told.arrived[-1] for told in failed if told.arrived)])
            await ended_well(server.port, seed=99)

    asyncio.run(crowds())
    assert num_errors >= places
    assert slowest < at(30, 2)  # on a busy machine it says little
    assert server.client.get("/readyz").status_code == 200
    assert server.metrics().total("requests_total", outcome="error") == num_errors
    evidence("places", places)
    evidence("streams ended with one error event", num_errors)
    evidence("slowest, s after its last token", round(slowest, 3))


def test_a_stream_with_nothing_to_say_is_pinged(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PING_S", "1")
    server = start(start_server, monkeypatch, "hang:5", "--stuck-after-s", 3, module="tests.service.watched")
    told = asyncio.run(ask(server.port, body(1)))
    assert streaming.PING_S == 15
    assert 1 <= told.content.count(b": ping\n\n") <= 1 + told.ended_at - told.arrived[-1]
    assert [name for name, _ in told.ends] == ["error"]


@pytest.mark.parametrize(("fault", "within_s"), [("die", 2.0), ("hang", 6.0)])
def test_an_engine_that_dies_or_hangs_ends_every_stream_and_then_the_process(
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    at: At,
    evidence: Evidence,
    fault: str,
    within_s: float,
) -> None:
    steps = at([70], [5 + 8 * place + 4 * (fault == "hang") for place in range(25)])

    def slowest_at(step: int) -> float:
        server = start(start_server, monkeypatch, f"{fault}:{step}", "--stuck-after-s", 3)
        answers, statuses = asyncio.run(crowd_and_probes(server))
        assert {200, 503} == set(statuses["/livez"]) == set(statuses["/readyz"]), "the probes have to say so"
        streams = [told for told in answers if told.status == 200]
        assert len(streams) >= 1
        assert [len(told.ends) for told in streams] == [1] * len(streams)
        assert {told.ends[0][1].get("code") for told in streams} == {"internal"}
        assert {told.status for told in answers} <= {200, 500, 503}, "who waited for a first token is told as well"
        assert server.exit_code() == 70
        last_token_at = max(told.arrived[-1] for told in streams)
        return max(told.ended_at - last_token_at for told in answers)

    with ThreadPoolExecutor(at(1, 3)) as pool:  # most of the time they wait
        slowest = max(pool.map(slowest_at, steps))
    assert slowest < at(30, within_s)
    evidence("places", len(steps))
    evidence("slowest end of a stream, s after the last token of any", round(slowest, 2))


async def crowd_and_probes(server: Server) -> tuple[list[Told], dict[str, list[int]]]:
    """32 streams that would run on for minutes, and what the probes say until there is nobody to ask."""
    statuses = {path: await probe(server.port, path) for path in ("/livez", "/readyz")}  # a fault may come at once
    crowd = asyncio.create_task(
        at_once(ask(server.port, body(seed, max_new_tokens=100_000)) for seed in range(STREAMS))
    )
    while server.process.poll() is None:
        for path, heard in statuses.items():
            heard += await probe(server.port, path)
        await asyncio.sleep(0.05)
    return await crowd, statuses


async def probe(port: int, path: str) -> list[int]:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = int((await reader.readline()).split()[1])
        writer.close()
    except (OSError, IndexError):  # it is gone
        return []
    return [status]


def test_a_row_that_is_not_a_number_ends_alone_and_harms_no_later_tenant(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, at: At, evidence: Evidence
) -> None:
    places = at(3, 50)
    server = start(start_server, monkeypatch, at_steps("nan", places))
    num_hit = num_equal = 0

    async def crowds() -> None:
        nonlocal num_hit, num_equal
        healthy: dict[int, list[dict[str, Any]]] = {}
        while num_hit < places:
            answers = await at_once(ask(server.port, body(seed)) for seed in range(STREAMS))
            hit = [told for told in answers if told.ends[0][0] == "error"]
            assert {told.ends[0][1]["code"] for told in hit} <= {"non_finite"}
            assert len(hit) <= 2, "a broken row has broken others"
            num_hit += len(hit)
            for seed, told in enumerate(answers):
                if told not in hit:
                    assert told.tokens == healthy.setdefault(seed, told.tokens)
                    num_equal += len(told.tokens)

    asyncio.run(crowds())
    assert num_hit == places
    evidence("rows broken, each alone", num_hit)
    evidence("tokens of others and of later tenants, all unchanged", num_equal)


def test_an_engine_that_only_raises_gives_up(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(start_server, monkeypatch, "raise:1,raise:2,raise:3")
    for seed in range(3):
        told = asyncio.run(ask(server.port, body(seed)))
        assert told.ends[0][1]["code"] == "internal"
    wait_until(lambda: server.process.poll() is not None)
    assert server.exit_code() == 70


def test_a_pause_of_the_whole_process_is_no_failure(start_server: StartServer) -> None:
    server = start_server("--stuck-after-s", 1).wait_until_ready()
    heard_at = gone_on_at = math.inf

    async def paused_in_the_middle() -> Told:
        stream = asyncio.create_task(ask(server.port, body(1, max_new_tokens=FOR_EVER), leave=has_gone_on))
        while server.metrics().total("generated_tokens_total") < 20:
            await asyncio.sleep(0.01)
        server.process.send_signal(19)  # SIGSTOP
        await asyncio.sleep(3)  # the length of the pause
        server.process.send_signal(18)
        return await stream

    def has_gone_on(told: Told) -> bool:
        """After silence tokens have come for longer than the engine is suspected before it is given up."""
        nonlocal heard_at, gone_on_at
        now = time.monotonic()
        gone_on_at = now if now - heard_at > 2 else gone_on_at
        heard_at = now
        return now - gone_on_at > 2

    told = asyncio.run(paused_in_the_middle())
    assert told.status == 200
    assert told.ends == []
    assert server.client.get("/livez").status_code == 200


def test_a_fault_that_is_none_is_refused_and_help_does_not_tell_of_it(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESCOPE_FAULT", "explode")
    server = start_server()
    assert server.exit_code() == 1
    assert "MOESCOPE_FAULT" in server.log
