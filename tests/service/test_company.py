"""A request's text depends on the request alone: not on who else is there, comes, or goes. Nothing is ever cached."""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from model.machine import usable_cpus
from tests.evidence import At, Evidence
from tests.service.crowd import Told, ask, at_once, in_turn
from tests.service.serving import ROOT, Server

STREAMS = 64
CHARACTERS = "ROMEO:\nWhat light through yonder window breaks? It is the east, and Juliet is the sun.\n"

Order = dict[str, Any]


def order(seed: int, length: int) -> Order:
    """One request of many kinds: what it asks for follows from its seed."""
    choose = random.Random(seed)
    prompt = (CHARACTERS * 5)[: choose.choice([0, 1, 6, 40, 129, 400])]
    optional: Order = {
        "top_k": choose.choice([0, 5, 65]),
        "top_p": choose.choice([1.0, 0.9]),
        "min_p": choose.choice([0.0, 0.05]),
        "logprobs": choose.choice([None, 0, 3]),
        "return_routed_experts": choose.choice([False, True]),
        "disabled_experts": choose.choice([[], [[0, 1]], [[0, 0], [1, 3], [2, 2]]]),
        "stop": choose.choice([[], ["zzz", "Zounds"]]),
    }
    temperature = choose.choice([0, 0.5, 0.8, 1.0, 1.4])
    new_tokens = round(length * choose.uniform(0.5, 1.5))
    return {"prompt": prompt, "seed": seed, "temperature": temperature, "max_new_tokens": new_tokens, **optional}


def told_of(answer: Told) -> tuple[list[dict[str, Any]], Any]:
    """All that must be equal: each token with text, log probabilities and experts, and how the experts were counted."""
    ((name, end),) = answer.ends
    assert name == "done"
    return answer.tokens, (end["text"], end["finish_reason"], end["usage"], end["routing"])


@dataclass(frozen=True)
class Size:
    """A crowd: of which model, decoded by what on how many threads, how long its texts are, and what makes it real."""

    checkpoint: Path | None
    runner: str
    threads: int
    length: int
    least_tokens: int
    least_batch: float
    num_copies: int


@pytest.fixture(scope="module", params=["tiny model, native", "tiny model, torch", "shipped model"])
def size(request: pytest.FixtureRequest, at: At) -> Size:
    if request.param == "tiny model, native":
        request.getfixturevalue("native_step")
        return at(Size(None, "native", 1, 400, 16_000, 8, 150), Size(None, "native", 2, 3000, 150_000, 24, 1000))
    if request.param == "tiny model, torch":
        return at(Size(None, "torch", 1, 40, 2_000, 8, 150), Size(None, "torch", 1, 1650, 100_000, 24, 1000))
    shipped, threads = ROOT / "checkpoints" / "shakespeare", usable_cpus()
    return at(Size(shipped, "auto", 1, 4, 150, 1, 10), Size(shipped, "auto", threads, 170, 10_000, 24, 200))


@pytest.fixture(scope="module")
def crowded(size: Size, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("crowded") / "log"
    folder = size.checkpoint or checkpoint
    flags = ("--checkpoint", folder, "--runner", size.runner, "--threads", size.threads, "--slots", STREAMS)
    server = Server(log, *flags, "--request-timeout-s", 3600, "--max-new-tokens", 5000)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def orders(size: Size) -> list[Order]:
    return [order(seed, size.length) for seed in range(STREAMS)]


@pytest.fixture(scope="module")
def alone(crowded: Server, orders: list[Order]) -> tuple[list[Told], float]:
    """The answers, one after the other, and the tokens per second of one stream."""
    began = time.monotonic()
    answers = asyncio.run(in_turn(ask(crowded.port, each) for each in orders))
    return answers, sum(len(answer.tokens) for answer in answers) / (time.monotonic() - began)


def test_half_of_a_crowd_may_be_killed_at_any_moment(
    crowded: Server, orders: list[Order], alone: tuple[list[Told], float], evidence: Evidence
) -> None:
    answers, _ = alone
    choose = random.Random(1)
    doomed = set(choose.sample(range(STREAMS), STREAMS // 2))

    def ask_until(seed: int) -> Any:
        last = choose.randrange(max(1, len(answers[seed].tokens))) if seed in doomed else None
        return ask(crowded.port, orders[seed], leave=lambda told: last is not None and len(told.arrived) > last)

    together = asyncio.run(at_once(ask_until(seed) for seed in range(STREAMS)))
    num_equal = 0
    for seed, (expected, got) in enumerate(zip(answers, together, strict=True)):
        if seed in doomed:
            assert got.tokens == expected.tokens[: len(got.tokens)], f"the beginning of {seed} is another one"
            num_equal += len(got.tokens)
        else:
            assert repr_of(got) == repr_of(expected), f"the killed ones have changed {seed}"
            num_equal += len(got.tokens)
    crowded.wait_for(requests_running=0)
    evidence("killed at random moments", len(doomed))
    evidence("tokens compared, none different", num_equal)


@pytest.mark.alone
def test_every_stream_of_a_crowd_is_bitwise_what_it_is_alone(
    size: Size, crowded: Server, orders: list[Order], alone: tuple[list[Told], float], evidence: Evidence
) -> None:
    answers, rate_alone = alone
    before = crowded.metrics()
    began = time.monotonic()
    together = asyncio.run(at_once(ask(crowded.port, each) for each in orders))
    rate = sum(len(answer.tokens) for answer in together) / (time.monotonic() - began)
    after = crowded.metrics()
    num_tokens = sum(len(answer.tokens) for answer in answers)
    assert num_tokens >= size.least_tokens
    different = [
        seed for seed, pair in enumerate(zip(answers, together, strict=True)) if len({*map(repr_of, pair)}) > 1
    ]
    assert different == []
    steps, rows = (after.total(f"batch_size_{kind}") - before.total(f"batch_size_{kind}") for kind in ("count", "sum"))
    assert rows / steps >= size.least_batch, "that was no crowd"
    evidence("tokens compared", num_tokens)
    evidence("different", len(different))
    evidence("mean batch size", round(rows / steps, 1))
    evidence("tokens/s of the crowd over those of one stream", round(rate / rate_alone, 2))


def repr_of(answer: Told) -> str:
    """Floats by their shortest exact notation: equal means equal in every bit."""
    return repr(told_of(answer))


def test_copies_of_one_request_under_random_load_are_one_text(
    size: Size, crowded: Server, at: At, evidence: Evidence
) -> None:
    choose = random.Random(2)
    copy = {"prompt": "JULIET:\n", "seed": 11, "temperature": 1, "max_new_tokens": at(24, 64)}
    num_copies = size.num_copies

    async def copies() -> list[Told]:
        room = asyncio.Semaphore(STREAMS)

        async def one(body: Order, leaves_after: float) -> Told:
            async with room:
                return await ask(crowded.port, body, leave=lambda told: len(told.arrived) > leaves_after)

        stranger = [one(order(1000 + i, 30), choose.choice([3, 20, 1e9])) for i in range(num_copies // 2)]
        wanted = [one(copy, 1e9) for _ in range(num_copies)]
        mixed = [*((False, each) for each in stranger), *((True, each) for each in wanted)]
        choose.shuffle(mixed)
        answers = await at_once(each for _, each in mixed)
        return [answer for (is_copy, _), answer in zip(mixed, answers, strict=True) if is_copy]

    texts = [answer.ends[0][1]["text"] for answer in asyncio.run(copies())]
    assert len(texts) == num_copies
    assert len(set(texts)) == 1
    assert len(texts[0]) == copy["max_new_tokens"]
    evidence("copies", len(texts))
    evidence("distinct texts", len(set(texts)))
