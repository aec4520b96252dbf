"""Under load, for long and beyond what can be served: nothing grows, streams flow, and a refusal is honest."""

import asyncio
import ctypes
import itertools
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import pytest

from service.engine.engine import Engine
from service.engine.loading import EngineOptions, build_engine
from service.engine.sequence import SamplingParams, Sequence
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.crowd import Told, ask, at_once, request, say
from tests.service.serving import FOR_EVER, Server

MIB: Final = 2**20
ENDLESS: Final = {"max_new_tokens": FOR_EVER}
SHIPPED: Final = Path(__file__).parents[2] / "checkpoints" / "shakespeare"

# What the mix is made of, with the statuses that are right for it.
GOOD: Final[list[dict[str, Any]]] = [
    {"prompt": "ROMEO:", "max_new_tokens": 12},
    {"max_new_tokens": 12, "stream": False},
    {"prompt": "To be", "max_new_tokens": 30, "stop": ["e", "th", "\n\n"]},
    {"prompt": "To be", "max_new_tokens": 30, "stop": ["xyzzy"], "stream": False},
    {"max_new_tokens": 8, "logprobs": 10, "return_routed_experts": True},
    {"max_new_tokens": 8, "logprobs": 0, "return_routed_experts": True, "stream": False},
    {"max_new_tokens": 8, "disabled_experts": [[0, 1], [2, 3]], "temperature": 0},
    {"max_new_tokens": 8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 2**63 - 1},
    {"prompt": "\u201cCaf\u00e9\u201d", "unknown_characters": "fold", "max_new_tokens": 4},
    {"prompt": "a" * 700, "max_new_tokens": 1},
]
INVALID: Final[list[dict[str, Any]]] = [
    {"prompt": "\u2205 \u00e9"},
    {"max_new_tokens": True},
    {"unknown": 1},
    {"stop": ["a"] * 5},
    {"prompt": "a" * 8193},
    {"disabled_experts": [[0, 0], [0, 1], [0, 2]]},
]
NOT_HTTP_ENOUGH: Final[list[tuple[bytes, int]]] = [
    (b"NONSENSE\r\n\r\n", 400),
    (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /generate HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (request({}).replace(b"application/json", b"text/plain"), 415),
    (request({"prompt": "a" * 70_000}), 413),
    (request({}).replace(b'{"', b"{x"), 400),
]
CUT_OFF: Final[list[dict[str, Any]]] = [ENDLESS, {**ENDLESS, "stream": False}]


def test_mixed_requests_by_the_thousand_leave_the_memory_as_it_was(server: Server, at: At, evidence: Evidence) -> None:
    asyncio.run(mixed(server.port, range(at(200, 1_500))))
    before = server.own_memory
    asked = range(at(400, 20_000))
    began = time.monotonic()
    answers = asyncio.run(mixed(server.port, asked))
    server.wait_for(requests_running=0, requests_queued=0)
    growth = (server.own_memory - before) / MIB
    assert growth <= 16
    assert sum(answers.values()) == len(asked)
    evidence("requests", len(asked))
    evidence(
        "answers by status (0: the client left)", ", ".join(f"{status} {n:,}" for status, n in sorted(answers.items()))
    )
    evidence("requests per second", len(asked) / (time.monotonic() - began))
    evidence("MiB of RssAnon and VmSwap gained", growth)


async def mixed(port: int, numbers: Iterable[int]) -> Counter[int]:
    """So many requests, sixteen at a time; each is checked. How often there was which status."""
    left = iter(numbers)
    statuses: Counter[int] = Counter()

    async def client() -> None:
        for number in left:
            statuses[await one_of_the_mix(port, random.Random(number))] += 1

    await at_once(client() for _ in range(16))
    return statuses


async def one_of_the_mix(port: int, dice: random.Random) -> int:
    kind = dice.random()
    if kind < 0.6:
        body = {"seed": dice.getrandbits(32), **dice.choice(GOOD)}
        told = await ask(port, body)
        assert told.status == 200
        assert is_complete(told) if body.get("stream", True) else told.json["finish_reason"] in ("length", "stop")
    elif kind < 0.75:
        told = await ask(port, dice.choice(INVALID))
        assert told.status == 422
    elif kind < 0.85:
        content, status = dice.choice(NOT_HTTP_ENOUGH)
        told = await say(port, content)
        assert told.status == status
    elif kind < 0.9:  # over before or after its first token
        told = await ask(port, {**ENDLESS, "prompt": "a" * 2000, "timeout_s": 0.1})
        assert told.status == 504 or told.ends[0][1]["finish_reason"] == "timeout"
    elif kind < 0.95:
        told = await ask(port, ENDLESS, leave=lambda told: len(told.arrived) > 3)
        assert told.status == 200
    else:
        try:
            told = await asyncio.wait_for(ask(port, dice.choice(CUT_OFF)), dice.uniform(0.01, 0.1))
        except TimeoutError:
            return 0
    return told.status


def is_complete(told: Told) -> bool:
    """One start, tokens in order, one end that agrees with them."""
    (_, done), names = told.ends[0], [name for name, _ in told.events]
    in_order = names == ["start", *["token"] * len(told.arrived), "done"]
    return in_order and told.text == done["text"] and done["finish_reason"] in ("length", "stop")


@pytest.mark.alone
def test_a_long_prompt_every_second_at_most_quadruples_the_gaps_of_sixteen_streams(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    checkpoint = at([], ["--checkpoint", SHIPPED])
    server = start_server("--slots", 32, *checkpoint).wait_until_ready()
    gaps = asyncio.run(gaps_with_and_without_prompts(server, seconds=at(1, 15), windows=at(2, 3)))
    p99 = {condition: percentile(gaps[condition], 99) for condition in (False, True)}
    evidence("tokens", sum(map(len, gaps.values())))
    evidence("median gap, ms, without and with", milliseconds(median(each) for each in gaps.values()))
    evidence("p99 gap, ms, without and with", milliseconds(p99.values()))
    evidence("ratio of the p99", p99[True] / p99[False])
    assert p99[True] <= 4 * p99[False]


async def gaps_with_and_without_prompts(server: Server, seconds: float, windows: int) -> dict[bool, list[float]]:
    """The gaps between the tokens of each stream, by whether long prompts came: so many windows of both, in turn."""
    is_over = asyncio.Event()
    asked = (ask(server.port, {**ENDLESS, "seed": seed}, leave=lambda told: is_over.is_set()) for seed in range(16))
    streams = [asyncio.create_task(each) for each in asked]
    spans: list[tuple[bool, float, float]] = []
    try:
        await until_running(server, 16)
        for with_prompts in [False, True] * windows:
            began = time.monotonic()
            if with_prompts:
                await prompts_for(server, seconds)
            else:
                await asyncio.sleep(seconds)
            spans.append((with_prompts, began, time.monotonic()))
            await until_running(server, 16)
    finally:
        is_over.set()
    arrived = [told.arrived for told in await asyncio.gather(*streams)]
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for times, (with_prompts, began, ended) in itertools.product(arrived, spans):
        inside = [moment for moment in times if began <= moment <= ended]
        gaps[with_prompts] += [later - earlier for earlier, later in itertools.pairwise(inside)]
    return gaps


async def prompts_for(server: Server, seconds: float) -> None:
    """A long prompt every second; those that are not through at the end leave."""
    asked = []
    for _ in range(max(1, round(seconds))):
        asked.append(asyncio.create_task(ask(server.port, {"prompt": "a" * 8192, "max_new_tokens": 1})))
        await asyncio.sleep(min(1, seconds))
    for task in asked:
        task.cancel()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {told.status for told in answers if isinstance(told, Told)} <= {200}


async def until_running(server: Server, number: int) -> None:
    await asyncio.to_thread(server.wait_for, requests_running=number)


def milliseconds(seconds: Iterable[float]) -> str:
    return ", ".join(f"{1e3 * each:.3g}" for each in seconds)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1]


def test_the_last_thousand_tokens_of_a_long_stream_are_as_quick_as_the_second(
    server: Server, checkpoint: Path, at: At, evidence: Evidence
) -> None:
    length, part = at((1_200, 300), (20_000, 1_000))
    long, marks = asyncio.run(measured_stream(server, length, (part, 2 * part, length - part, length)))
    used = [late.cpu_s - early.cpu_s for early, late in zip(marks[::2], marks[1::2], strict=True)]
    growth = (marks[-1].memory - marks[1].memory) / MIB
    evidence("tokens", length)
    evidence(f"MiB gained between token {2 * part:,} and token {length:,}", growth)
    assert is_complete(long)
    assert len(long.arrived) == length
    assert growth <= 4
    if at.full_size:  # a part of 300 tokens is too short to be timed on a busy machine, and may come in one write
        ratio = last_to_second(checkpoint, length, part)
        evidence(f"time of the last {part:,} to the second {part:,}, in the engine, in turn", ratio)
        evidence("the same for CPU seconds of the whole server", used[1] / used[0])
        assert ratio == pytest.approx(1, abs=0.1)
        assert used[1] / used[0] == pytest.approx(1, abs=0.5)


@dataclass(frozen=True)
class Mark:
    """What a server had used, and held, at some token of a stream."""

    cpu_s: float
    memory: int


async def measured_stream(server: Server, length: int, at_tokens: Iterable[int]) -> tuple[Told, list[Mark]]:
    marks: list[Mark] = []
    coming = deque(at_tokens)

    def look(told: Told) -> bool:
        while coming and len(told.arrived) >= coming[0]:
            coming.popleft()
            marks.append(Mark(server.cpu_seconds, server.own_memory))
        return False

    return await ask(server.port, {"max_new_tokens": length, "seed": 1}, leave=look), marks


def last_to_second(checkpoint: Path, length: int, part: int) -> float:
    """Seconds of the last part of a text to those of its second part.

    The speed of a machine drifts by more than what is looked for. So there are two sequences, one near its end and one
    near its beginning, that write five tokens each in turn, and the median over these pairs counts.
    """
    options = EngineOptions(checkpoint, "cpu", threads=1, slots=4, kv_memory_mib=64, prefill_chunk=16)
    engine, _ = build_engine(options, lambda phase: None)
    old, young = (Sequence((1,), SamplingParams(max_new_tokens=length + 1, seed=1), max_unread=0) for _ in range(2))
    engine.add(old)
    engine.add(young)
    write(engine, old, length - part)
    write(engine, young, part)
    ratios = []
    for done in range(5, part + 1, 5):
        ratios.append(write(engine, old, length - part + done) / write(engine, young, part + done))
    return median(ratios)


def write(engine: Engine, sequence: Sequence, length: int) -> float:
    """Seconds until this one has so many tokens; all others are paused."""
    sequence.max_unread, began = None, time.perf_counter()
    while len(sequence.token_ids) < length:
        engine.step()
    sequence.max_unread = 0
    return time.perf_counter() - began


@dataclass
class Crush:
    """What came of an overload: how long the refused and the accepted waited, and what the refused were told."""

    accepted: list[Told] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    refused_after_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)


@pytest.mark.alone
def test_ten_times_overload_is_refused_promptly_and_honestly_and_what_is_accepted_is_complete(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    seconds, tokens = at(4, 60), at(50, 100)
    # By torch: ten times what the native step can write of so small a model is more than a client can ask for.
    server = start_server("--slots", 4, "--queue", 24, "--runner", "torch").wait_until_ready()
    rate = asyncio.run(service_rate(server.port, tokens))
    crush = asyncio.run(overload(server.port, tokens, 10 * rate, seconds))
    assert set(crush.statuses) == {200, 429}
    assert all(is_complete(told) and len(told.arrived) == tokens for told in crush.accepted)
    # The first refusals come before a queue has ever been waited through.
    later = crush.retry_after_s[len(crush.retry_after_s) // 4 :]
    waits = [told.ends[0][1]["timings"]["queue_s"] for told in crush.accepted[len(crush.accepted) // 2 :]]
    total = median(told.ends[0][1]["timings"]["total_s"] for told in crush.accepted)
    evidence("requests per second served alone, and asked for", f"{rate:.3g}, {10 * rate:.3g}")
    evidence("accepted and complete, refused", f"{crush.statuses[200]:,}, {crush.statuses[429]:,}")
    evidence("p99 of a refusal, ms", 1e3 * percentile(crush.refused_after_s, 99))
    evidence("seconds told to wait, and spent in the queue, medians", f"{median(later)}, {median(waits):.3g}")
    assert percentile(crush.refused_after_s, 99) < total
    assert all(1 <= told <= 60 for told in crush.retry_after_s)
    assert median(waits) / 3 <= median(later) <= max(1, 3 * median(waits))


async def service_rate(port: int, tokens: int) -> float:
    """Requests per second of eight clients who ask again as soon as they are answered."""
    began, rounds = time.monotonic(), 4

    async def client() -> None:
        for _ in range(rounds):
            await ask(port, {"max_new_tokens": tokens})

    await at_once(client() for _ in range(8))
    return 8 * rounds / (time.monotonic() - began)


async def overload(port: int, tokens: int, rate: float, seconds: float) -> Crush:
    """An open loop: requests come at this rate whatever becomes of those before."""
    crush = Crush()

    async def client() -> None:
        asked_at = time.monotonic()
        told = await ask(port, {"max_new_tokens": tokens})
        crush.statuses[told.status] += 1
        if told.status == 200:
            crush.accepted.append(told)
        else:
            crush.refused_after_s.append(told.ended_at - asked_at)
            crush.retry_after_s.append(int(told.headers["retry-after"]))

    began = time.monotonic()
    clients: list[asyncio.Task[None]] = []
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        clients.append(asyncio.create_task(client()))
    await asyncio.gather(*clients)
    return crush


def test_an_idle_server_uses_less_than_a_hundredth_of_a_core(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    """Its team of threads has worked before, and waits."""
    server = start_server("--threads", 2).wait_until_ready()
    server.answer(max_new_tokens=500)
    server.wait_for(requests_running=0)
    used, began = server.cpu_seconds, time.monotonic()
    time.sleep(at(5, 60))  # this is what is measured
    share = (server.cpu_seconds - used) / (time.monotonic() - began)
    evidence("decoded by", server.client.get("/info").json()["runner"])
    evidence("threads of the process", len(server.threads))
    evidence("percent of a core", 100 * share)
    assert share < 0.01


@contextmanager
def on_one_core() -> Iterator[None]:
    """Who is started meanwhile stays there."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.alone
def test_two_threads_on_one_core_do_at_least_half_of_what_one_does(
    start_server: StartServer, native_step: ctypes.CDLL, at: At, evidence: Evidence
) -> None:
    """By CPU time in the least disturbed round, and by the clock where nobody else wants the core."""
    streams, tokens = 8, at(60, 150)
    with on_one_core():
        flags = ("--checkpoint", SHIPPED, "--runner", "native", "--slots", streams)
        servers = [start_server(*flags, "--threads", threads) for threads in (1, 2)]
    for server in servers:
        server.wait_until_ready()
    used: list[list[tuple[float, float]]] = [[], []]
    for _ in range(at(6, 15)):
        for server, times in zip(servers, used, strict=True):
            began = time.monotonic(), server.cpu_seconds
            answers = asyncio.run(at_once(ask(server.port, {"max_new_tokens": tokens}) for _ in range(streams)))
            assert all(is_complete(told) for told in answers)
            times.append((time.monotonic() - began[0], server.cpu_seconds - began[1]))
    one, two = ([min(each) for each in zip(*times, strict=True)] for times in used)
    by_clock, by_cpu = (alone / shared for alone, shared in zip(one, two, strict=True))
    evidence("streams", streams)
    evidence("speed of two threads over that of one, by CPU time and by the clock", f"{by_cpu:.2f}, {by_clock:.2f}")
    assert by_cpu >= at(0.33, 0.5)  # a fifth when each spins for as long as where it has a core for itself
    if at.full_size:
        assert by_clock >= 0.5


def test_who_waits_too_long_is_a_504_and_who_runs_too_long_ends_as_timed_out(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    wait_s, waiting = at(1, 5), at(4, 100)
    flags = ("--slots", 2, "--queue-timeout-s", wait_s, "--request-timeout-s", 3 * wait_s)
    server = start_server(*flags).wait_until_ready()
    began, running, refused = asyncio.run(two_run_and_others_wait(server, waiting))
    outcomes = server.metrics().by("requests_total", "outcome")
    late = [told for told in refused if told.status == 504]
    evidence("seconds that the queue may take", wait_s)
    evidence("refused when they were over, and at once as they would be", f"{len(late)}, {len(refused) - len(late)}")
    evidence("seconds of the streams", max(told.ends[0][1]["timings"]["total_s"] for told in running))
    evidence("their limit", 3 * wait_s)
    assert late, "the first in the queue may always wait"
    assert {(told.status, told.json["error"]["code"]) for told in refused} <= {
        (504, "queue_timeout"),
        (429, "queue_full"),
    }
    assert all(told.headers["content-type"] == "application/json" for told in refused)
    assert all(1 <= int(told.headers["retry-after"]) <= 60 for told in refused)
    assert all(told.ended_at >= began + wait_s for told in late)
    for told in running:
        ((name, done),) = told.ends
        assert (name, done["finish_reason"]) == ("done", "timeout")
        assert done["text"] == told.text
        assert done["timings"]["total_s"] >= 3 * wait_s
        assert told.ended_at > max(each.ended_at for each in refused)
    assert (outcomes["rejected_deadline"], outcomes["timeout"]) == (len(late), 2)


async def two_run_and_others_wait(server: Server, waiting: int) -> tuple[float, list[Told], list[Told]]:
    """When the queue began; what the two heard, and what the others."""
    running = [asyncio.create_task(ask(server.port, ENDLESS)) for _ in range(2)]
    await until_running(server, 2)
    began = time.monotonic()
    refused = await at_once(ask(server.port, {"stream": number % 2 == 0}) for number in range(waiting))
    return began, list(await asyncio.gather(*running)), refused
