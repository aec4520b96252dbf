"""A stream survives its server: after a kill -9 the client goes on where it was, with any that has the fingerprint."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_checkpoint
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.crowd import Told, ask
from tests.service.serving import Server, free_port

STREAMS = 8


def body(seed: int) -> dict[str, Any]:
    return {"prompt": "ROMEO:", "seed": seed, "max_new_tokens": 250, "temperature": 1.2, "logprobs": 1}


async def whole(port: int, asked: dict[str, Any], restarted: asyncio.Event) -> tuple[list[dict[str, Any]], int]:
    """All tokens of a request, whatever becomes of its servers meanwhile, and how often it had to go on."""
    tokens: list[dict[str, Any]] = []
    told, last_event_id, resumed = Told(), None, -1
    while not told.ends:
        resumed += 1
        await restarted.wait()
        try:
            told = await ask(port, asked, last_event_id=last_event_id)
        except ConnectionError:  # it has been killed already, and not come back yet
            await asyncio.sleep(0.01)
            continue
        tokens += told.tokens
        last_event_id = told.last_event_id or last_event_id
    assert told.ends[0][0] == "done"
    assert told.ends[0][1]["text"] == "".join(token["text"] for token in tokens)
    return tokens, resumed


def test_no_letter_is_lost_doubled_or_different_when_the_server_is_killed(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    num_kills, port = at(2, 50), free_port()
    choose = random.Random(3)
    servers = [start_server("--slots", STREAMS, port=port).wait_until_ready()]
    results: dict[int, tuple[list[dict[str, Any]], int]] = {}

    async def stream_until(is_over: asyncio.Event, restarted: asyncio.Event, seed: int) -> None:
        while not is_over.is_set():
            results[seed] = await whole(port, body(seed), restarted)
            seed += STREAMS

    async def kill_often() -> None:
        is_over, restarted = asyncio.Event(), asyncio.Event()
        restarted.set()
        streams = [asyncio.create_task(stream_until(is_over, restarted, seed)) for seed in range(STREAMS)]
        for _ in range(num_kills):
            await asyncio.sleep(choose.uniform(0.05, 1.0))  # the moment of the kill
            restarted.clear()
            servers[-1].process.kill()
            servers[-1].process.wait()
            servers.append(start_server("--slots", STREAMS, port=port))
            await asyncio.to_thread(servers[-1].wait_until_ready)
            restarted.set()
        is_over.set()
        await asyncio.gather(*streams)

    asyncio.run(kill_often())
    assert sum(resumed for _, resumed in results.values()) >= num_kills, "the kills hit nobody"

    async def compare() -> int:
        different = 0
        for seed, (tokens, _) in results.items():
            expected = (await ask(port, body(seed))).tokens
            assert [token["index"] for token in tokens] == list(range(len(expected)))
            different += sum(got != wanted for got, wanted in zip(tokens, expected, strict=True))
        return different

    assert asyncio.run(compare()) == 0
    evidence("kills", num_kills)
    evidence("times a stream went on", sum(resumed for _, resumed in results.values()))
    evidence("letters compared, none lost, doubled or different", sum(len(tokens) for tokens, _ in results.values()))


@pytest.fixture
def broken_off(server: Server) -> Told:
    return asyncio.run(ask(server.port, body(1), leave=lambda told: len(told.arrived) >= 20))


def test_going_on_tells_the_rest_and_the_whole_text_at_the_end(server: Server, broken_off: Told) -> None:
    rest = asyncio.run(ask(server.port, body(1), last_event_id=broken_off.last_event_id))
    expected = asyncio.run(ask(server.port, body(1)))
    assert rest.events[0][0] == "start"
    assert broken_off.tokens + rest.tokens == expected.tokens
    assert rest.ends[0][1]["text"] == expected.text
    assert rest.ends[0][1]["usage"] == expected.ends[0][1]["usage"]


def test_going_on_after_the_end_tells_only_the_end(server: Server) -> None:
    first = asyncio.run(ask(server.port, body(2)))
    again = asyncio.run(ask(server.port, body(2), last_event_id=first.last_event_id))
    assert [name for name, _ in again.events] == ["start", "done"]
    assert again.ends[0][1]["text"] == first.text


@pytest.mark.parametrize(
    ("event_id", "changes", "status", "code"),
    [
        ("0123456789ab:5", {}, 409, "other_fingerprint"),
        ("nonsense", {}, 422, "bad_event_id"),
        ("{fingerprint}:250", {}, 422, "bad_event_id"),
        ("{fingerprint}:-2", {}, 422, "bad_event_id"),
        ("{fingerprint}:5", {"stream": False}, 422, "bad_event_id"),
        ("{fingerprint}:5", {"seed": None}, 422, "seed_needed"),
    ],
)
def test_what_cannot_go_on_here_is_refused(
    server: Server, event_id: str, changes: dict[str, Any], status: int, code: str
) -> None:
    fingerprint = server.client.get("/info").json()["fingerprint"]
    told = asyncio.run(ask(server.port, {**body(1), **changes}, last_event_id=event_id.format(fingerprint=fingerprint)))
    assert (told.status, told.json["error"]["code"]) == (status, code)


def test_the_fingerprint_is_that_of_model_and_threads(
    server: Server, start_server: StartServer, checkpoint: Path, tmp_path: Path
) -> None:
    def fingerprint(*flags: object) -> str:
        return str(start_server(*flags).wait_until_ready().client.get("/info").json()["fingerprint"])

    here = server.client.get("/info").json()["fingerprint"]
    assert fingerprint() == here
    assert fingerprint("--threads", 2) != here
    assert fingerprint("--checkpoint", tiny_checkpoint(tmp_path / "other", seed=1)) != here
