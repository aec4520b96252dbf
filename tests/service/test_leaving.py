"""Whoever leaves, in whatever way and at whatever moment, leaves nothing behind; a slow reader loses nothing.

The clients that are killed or stopped are processes of their own, each with several connections.
"""

import itertools
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import pytest

from service.engine.loading import EngineOptions, build_engine
from service.engine.reports import Figures, StepReport
from service.engine.sequence import Ended, SamplingParams, Sequence
from service.engine.thread import EnginePhase, EngineThread
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.crowd import narrow_connection, request
from tests.service.serving import FOR_EVER, PATIENCE_S, ROOT, Event, Server, parse_events, wait_until

FAT: dict[str, Any] = {"logprobs": 10, "return_routed_experts": True}
LONG_PROMPT = "a" * 8192
STALLED_AFTER_S = 15


class Crowd(Protocol):
    """Clients that leave together, in one way."""

    def send(self, content: bytes) -> None: ...
    def leave(self) -> None: ...


@dataclass
class Connections:
    """Clients in this process."""

    port: int
    hang_up: Callable[[socket.socket], None]
    held: list[socket.socket] = field(default_factory=list)

    def send(self, content: bytes) -> None:
        self.held.append(socket.create_connection(("127.0.0.1", self.port), PATIENCE_S))
        self.held[-1].sendall(content)

    def leave(self) -> None:
        for connection in self.held:
            self.hang_up(connection)

    def close(self) -> None:
        for connection in self.held:
            connection.close()


class Process:
    """Clients in a process that gets a signal."""

    def __init__(self, port: int, number: signal.Signals) -> None:
        self._number = number
        life = f"from tests.service.crowd import hold_connections; hold_connections({port})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", life], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def send(self, content: bytes) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(content.hex() + "\n")
        assert self._process.stdout.readline() == "\n"

    def leave(self) -> None:
        self._process.send_signal(self._number)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def fin(connection: socket.socket) -> None:
    connection.setblocking(False)
    with suppress(BlockingIOError):
        while connection.recv(2**20):
            pass
    connection.close()  # with bytes unread it would be a reset


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@contextmanager
def five_ways(port: int) -> Iterator[dict[str, Crowd]]:
    crowds: dict[str, Connections | Process] = {
        "FIN": Connections(port, fin),
        "RST": Connections(port, reset),
        "half-close": Connections(port, half_close),
        "SIGKILL": Process(port, signal.SIGKILL),
        "SIGSTOP": Process(port, signal.SIGSTOP),
    }
    with ExitStack() as stack:
        for crowd in crowds.values():
            stack.callback(crowd.close)
        yield dict(crowds)


@dataclass(frozen=True)
class Books:
    """What a process holds, as far as it can be seen from outside and through the window of `watched`."""

    running: float
    queued: float
    descriptors: Counter[str]
    threads: int
    tasks: list[str]

    @classmethod
    def of(cls, server: Server) -> "Books":
        metrics = server.metrics()  # on a connection that is open from then on
        process = Path(f"/proc/{server.process.pid}")
        return cls(
            metrics.total("requests_running"),
            metrics.total("requests_queued"),
            Counter(re.sub(r"\d+", "", target) for target in targets(process / "fd")),
            len(list((process / "task").iterdir())),
            tasks(server),
        )


def targets(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        with suppress(FileNotFoundError):
            yield str(link.readlink())


def tasks(server: Server) -> list[str]:
    """Those that are there in each of three looks: one that is about to end is in the first at most."""
    looks = [Counter(look_at_tasks(server)) for _ in range(3)]
    return sorted((looks[0] & looks[1] & looks[2]).elements())


def look_at_tasks(server: Server) -> list[str]:
    def told() -> list[str]:
        return re.findall(r'^{"tasks": .*}$', server.log, re.MULTILINE)

    before = len(told())
    server.signal(signal.SIGUSR1)
    wait_until(lambda: len(told()) > before)
    names: list[str] = json.loads(told()[-1])["tasks"]
    return names


def settle(server: Server, books: Books) -> None:
    try:
        wait_until(lambda: Books.of(server) == books)
    except AssertionError:
        assert Books.of(server) == books  # which says what is left


def test_clients_that_die_in_five_ways_leave_slots_descriptors_and_tasks_as_they_were(
    start_server: StartServer, at: At, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STALLED_AFTER_S", str(at(3, STALLED_AFTER_S)))
    each, rounds = at(1, 2), at(1, 4)
    running = 2 * 5 * each * 2  # decoding and reading their prompts, in five ways, streaming and not
    flags = ("--slots", running, "--prefill-chunk", 16, "--runner", "torch")  # native reads them before they are left
    server = start_server(*flags, module="tests.service.watched").wait_until_ready()
    server.answer(max_new_tokens=3, **FAT)
    before, began = Books.of(server), time.monotonic()
    for number in range(1, rounds + 1):
        with five_ways(server.port) as crowds:
            read = server.metrics().total("prompt_tokens_total")
            for prompt, gauges in (
                ("", {"requests_running": running // 2}),
                (LONG_PROMPT, {"requests_running": running}),
                ("", {"requests_queued": running // 2}),
            ):
                for crowd, stream, _ in itertools.product(crowds.values(), (True, False), range(each)):
                    is_stopped = crowd is crowds["SIGSTOP"]
                    asked = {
                        "prompt": prompt[: 1024 if is_stopped else None],  # this one is going to be read to its end
                        "stream": stream,
                        # That a stopped client does not read a plain answer shows only when there is one.
                        "max_new_tokens": 400 if is_stopped and not stream else FOR_EVER,
                        **FAT,
                    }
                    crowd.send(request(asked))
                server.wait_for(**gauges)
            read = server.metrics().total("prompt_tokens_total") - read
            assert read < running // 2 + len(LONG_PROMPT), "the long prompts were to be unread yet"
            for crowd in crowds.values():
                crowd.leave()
            settle(server, before)
            ends = server.metrics().by("requests_total", "outcome")
            assert sum(ends.values()) - 1 == number * running * 3 / 2, "each ends once"
            # Who has visibly gone is cancelled; only who seems to be there may be waited for.
            assert ends["cancelled"] >= number * running * 3 / 2 * 4 / 5
    assert "Traceback" not in server.log
    everybody = [server.send(max_new_tokens=FOR_EVER) for _ in range(running + 1)]
    server.wait_for(requests_running=running, requests_queued=1)
    for connection in everybody:
        connection.close()
    settle(server, before)
    evidence("clients that left", rounds * running * 3 // 2)
    evidence("slots, descriptors, threads and tasks left behind", 0)
    evidence("seconds until the last trace was gone, stopped clients included", (time.monotonic() - began) / rounds)


class Steps:
    """Counts an engine's steps, and remembers at which one each sequence ended."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.ends: dict[Sequence, int] = {}
        self.tokens: Counter[Sequence] = Counter()

    def publish(self, report: StepReport) -> None:
        with self.changed:
            self.count += report.phase is not None
            for sequence, events in report.events:
                self.tokens[sequence] += len(events)
                if isinstance(events[-1], Ended):
                    self.ends[sequence] = self.count
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)


def test_a_slot_is_free_within_two_steps_of_its_cancel(checkpoint: Path, at: At, evidence: Evidence) -> None:
    steps, took = Steps(), list[int]()
    options = EngineOptions(checkpoint, "cpu", threads=1, slots=4, kv_memory_mib=64, prefill_chunk=16)
    engine = EngineThread(partial(build_engine, options), steps.publish, max_queued=4, grace_s=0)
    engine.start()
    while engine.phase is not EnginePhase.READY:
        engine.join(0.01)
    try:
        bystanders = [endless(3) for _ in range(2)]
        for sequence in bystanders:
            engine.submit(sequence)
        for _ in range(at(5, 100)):
            leavers = [endless(3), endless(10**5), endless(3)]  # in decode, in prefill, in the queue
            for sequence in leavers:
                engine.submit(sequence)
            steps.wait(lambda leaver=leavers[0]: steps.tokens[leaver] > 2)  # type: ignore[misc]
            for sequence in (leavers[2], leavers[1], leavers[0]):
                with steps.changed:  # so that no step is counted in between
                    at_step = steps.count
                    engine.cancel(sequence)
                steps.wait(partial(steps.ends.__contains__, sequence))
                took.append(steps.ends[sequence] - at_step)
            assert figures(engine).running == len(bystanders)
    finally:
        engine.drain()
        engine.join(PATIENCE_S)
    assert max(took) <= 2
    evidence("cancelled sequences", len(took))
    evidence("most steps until the slot was free", max(took))


def endless(prompt_length: int) -> Sequence:
    return Sequence((1,) * prompt_length, SamplingParams(max_new_tokens=10**9))


def figures(engine: EngineThread) -> Figures:
    answered: list[Figures] = []
    arrived = threading.Event()

    def reply(one: Figures) -> None:
        answered.append(one)
        arrived.set()

    engine.figures(reply)
    assert arrived.wait(PATIENCE_S)
    return answered[0]


def test_a_slow_reader_is_paused_and_loses_nothing_and_one_who_stays_slow_is_stalled(
    server: Server, start_server: StartServer, at: At, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thousand tokens that nobody reads may take more than 15 s where the machine is busy.
    monkeypatch.setenv("STALLED_AFTER_S", str(PATIENCE_S))
    patient = start_server("--slots", 4, module="tests.service.watched").wait_until_ready()
    length = at(1_300, 3_000)
    with narrow_connection(patient.port) as reader:
        reader.sendall(request({"max_new_tokens": length, "seed": 1, **FAT}))
        patient.wait_for(requests_running=1)
        wait_until(lambda: written_beside(patient) == 0)
        assert [written_beside(patient) for _ in range(3)] == [0, 0, 0], "it has left the batch"
        assert patient.metrics().total("requests_running") == 1, "and keeps its slot"
        events = rest_of(reader)
    tokens = [data for name, data in events if name == "token"]
    assert [name for name, _ in events if name != "token"] == ["start", "done"]
    assert tokens == patient.answer("", max_new_tokens=length, seed=1, **FAT)["tokens"]
    evidence("tokens that a reader got after a pause, the same as without one", len(tokens))
    if at(False, True):
        evidence("seconds that a reader of some kB/s was listened to before it was stalled", stalled_after(server))


def stalled_after(server: Server) -> float:
    """Reads all the time, but far too slowly, and to the end once its sequence has been ended."""
    before = server.metrics().total("requests_total", outcome="stalled")
    with narrow_connection(server.port) as reader:
        reader.sendall(request({"max_new_tokens": FOR_EVER, **FAT}))
        server.wait_for(requests_running=1)
        began, first = time.monotonic(), b""
        while server.metrics().total("requests_total", outcome="stalled") == before:
            # With much less now and then, its connection counts as dead before its sequence does as stalled.
            pieces = [reader.recv(1024) for _ in range(3)]
            assert all(pieces), "it was cut"
            first += b"".join(pieces)
            assert time.monotonic() - began < 10 * STALLED_AFTER_S
            time.sleep(0.25)  # which is what makes it slow
        took = time.monotonic() - began
        events = rest_of(reader, first)
    assert took >= STALLED_AFTER_S
    assert [data["index"] for name, data in events if name == "token"] == list(range(len(events) - 2))
    name, last = events[-1]
    assert (name, last["code"]) == ("error", "stalled")
    return took


def written_beside(server: Server) -> float:
    """How many tokens others drew while one asked for 50."""
    before = server.metrics().total("generated_tokens_total")
    server.answer(max_new_tokens=50)
    return server.metrics().total("generated_tokens_total") - before - 50


def rest_of(connection: socket.socket, first: bytes = b"") -> list[Event]:
    """The events of an answer of which this much has been read, until its end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    connection.settimeout(PATIENCE_S)
    answer = bytearray(first)
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        piece = connection.recv(2**20)
        assert piece, "it was cut"
        answer += piece
    return parse_events(b"".join(chunks(BytesIO(answer))).decode().split("\n"))


def chunks(answer: BytesIO) -> Iterator[bytes]:
    while answer.readline() != b"\r\n":  # its head
        pass
    while size := int(answer.readline(), 16):
        yield answer.read(size)
        answer.readline()
