"""SIGTERM and Ctrl-C: those who run may finish, those who wait are told, nobody hangs, and the exit code is 0."""

import asyncio
import json
import signal
import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from service import server as edge
from service.app import create_app
from service.protocol import Bounds
from service.settings import read_settings
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.crowd import Told, ask, narrow_connection, request
from tests.service.serving import FOR_EVER, Server, parse_events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_end_with_one_event_and_what_waits_with_a_503(
    start_server: StartServer, number: signal.Signals
) -> None:
    server = start_server("--slots", 2, "--grace-s", 1).wait_until_ready()
    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(server.generate, max_new_tokens=FOR_EVER)
        plain = pool.submit(server.generate, max_new_tokens=FOR_EVER, stream=False)
        server.wait_for(requests_running=2)
        waiting = pool.submit(server.generate)
        server.wait_for(requests_queued=1)
        server.signal(number)
        assert waiting.result().status_code == 503
        assert server.client.get("/readyz").json()["phase"] == "draining"
        refused = server.generate()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    assert waiting.result().json()["error"]["code"] == "shutdown"
    assert (plain.result().status_code, plain.result().json()["error"]["code"]) == (503, "shutdown")
    name, last = parse_events(streamed.result().iter_lines())[-1]
    assert (name, last["code"], last["error"]["code"]) == ("error", "shutdown", "shutdown")
    assert server.exit_code() == 0
    assert "Traceback" not in server.log
    assert '"level": "error"' not in server.log


def test_sigterm_with_32_streams_in_flight_ends_each_once_and_the_quick_ones_complete(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    drains = []
    for _ in range(at(1, 20)):
        server = start_server("--slots", 32, "--grace-s", 5).wait_until_ready()
        # Half a second's work: not over before all flow, and over within the grace time, on a busy machine too.
        quick = 500 if server.client.get("/info").json()["runner"] == "native" else 50
        drains.append(asyncio.run(drain_in_flight(server, [FOR_EVER] * 16 + [quick] * 16)))
    heard = [len(told.arrived) for drained in drains for told in drained]
    for drained in drains:
        events = [told.events for told in drained]  # hundreds of thousands: they are parsed once
        ends = [[event for event in each if event[0] in ("done", "error")] for each in events]
        assert {len(each) for each in ends} == {1}
        assert [each[-1] for each in events] == [each[0] for each in ends], "and nothing comes after it"
        assert [(name, end["code"]) for ((name, end),) in ends[:16]] == [("error", "shutdown")] * 16
        assert [(name, end["usage"]["generated_tokens"]) for ((name, end),) in ends[16:]] == [("done", quick)] * 16
        texts = ["".join(data["text"] for name, data in each if name == "token") for each in events]
        assert texts[16:] == [end["text"] for ((_, end),) in ends[16:]]
    evidence("drains with exit code 0", len(drains))
    evidence("streams ended once, half of them complete", len(heard))
    evidence("tokens of the longest that was cut off", max(heard))


async def drain_in_flight(server: Server, lengths: list[int]) -> list[Told]:
    """SIGTERM as soon as every stream has a token and none its end; what each of them heard.

    Those who have no end begin first: once they flow, others share the engine with them from their first token on.
    """
    in_flight: dict[int, int] = {}
    half_flow, all_flow = asyncio.Event(), asyncio.Event()

    def listen(number: int, told: Told) -> bool:
        in_flight[number] = len(told.arrived)
        flowing = sum(map(bool, in_flight.values()))
        if flowing >= len(lengths) // 2:
            half_flow.set()
        if flowing == len(lengths):
            all_flow.set()
        return False

    def begin(numbers: range) -> list[asyncio.Task[Told]]:
        asked = (ask(server.port, {"max_new_tokens": lengths[each]}, leave=partial(listen, each)) for each in numbers)
        return [asyncio.create_task(each) for each in asked]

    streams = begin(range(len(lengths) // 2))
    await half_flow.wait()
    streams += begin(range(len(lengths) // 2, len(lengths)))
    await all_flow.wait()
    assert all(in_flight[number] < length for number, length in enumerate(lengths))
    server.signal(signal.SIGTERM)
    drained = list(await asyncio.gather(*streams))
    assert server.exit_code() == 0
    assert "Traceback" not in server.log
    return drained


def test_a_stream_that_ends_within_the_grace_time_is_complete(start_server: StartServer) -> None:
    server = start_server("--grace-s", 1000).wait_until_ready()
    connection = narrow_connection(server.port)  # unread, it holds a text up that would be over in no time
    connection.sendall(request({"max_new_tokens": 5_000}))
    server.wait_for(requests_running=1)
    server.signal(signal.SIGTERM)
    server.wait_for(ready=0)
    with connection, connection.makefile("rb") as answer:
        last = deque((line for line in answer if line.startswith(b"data: ")), maxlen=1).pop()
    assert json.loads(last.removeprefix(b"data: "))["usage"]["generated_tokens"] == 5_000
    assert server.exit_code() == 0


def test_a_second_signal_does_not_wait(start_server: StartServer) -> None:
    server = start_server("--grace-s", 1000).wait_until_ready()
    connection = server.send(max_new_tokens=FOR_EVER)
    server.wait_for(requests_running=1)
    server.signal(signal.SIGTERM)
    server.wait_for(ready=0)
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 128 + signal.SIGTERM
    connection.close()


def test_a_standard_output_that_takes_nothing_is_no_reason_not_to_serve(start_server: StartServer) -> None:
    with Path("/dev/full").open("w") as full:
        server = start_server(stdout=full).wait_until_it_listens()
    server.wait_for(ready=1)
    assert server.answer(max_new_tokens=3)["usage"]["generated_tokens"] == 3
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert "Traceback" not in server.log


def test_a_bug_in_the_server_s_own_loop_ends_the_engine_too(checkpoint: Path) -> None:
    class Buggy(edge.Server):
        async def on_tick(self, counter: int) -> bool:
            raise ZeroDivisionError

    app = create_app(read_settings(["--checkpoint", str(checkpoint), "--threads", "1"]))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ZeroDivisionError):
        Buggy(app, listener, Bounds(connections=1)).run(sockets=[listener])  # returns when the engine's thread has
