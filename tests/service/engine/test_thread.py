"""The mailbox: whoever calls from another thread gets an answer, and every sequence ends exactly once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from service.engine.loading import EngineOptions, build_engine
from service.engine.reports import Figures, StepReport
from service.engine.sequence import Ended, FinishReason, SamplingParams, Sequence
from service.engine.thread import EnginePhase, EngineThread, NotServing, QueueFull
from tests.checkpoints import tiny_checkpoint

PATIENCE_S = 60


class Listener:
    """Collects what the engine publishes, and lets a test wait for an end."""

    def __init__(self) -> None:
        self.ends: dict[Sequence, list[Ended]] = defaultdict(list)
        self.tokens: dict[Sequence, int] = defaultdict(int)
        self._changed = threading.Condition()

    def publish(self, report: StepReport) -> None:
        with self._changed:
            for sequence, events in report.events:
                self.ends[sequence] += [event for event in events if isinstance(event, Ended)]
                self.tokens[sequence] += sum(not isinstance(event, Ended) for event in events)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S)


def options(folder: Path, slots: int = 2) -> EngineOptions:
    return EngineOptions(folder, "cpu", threads=1, slots=slots, kv_memory_mib=64, prefill_chunk=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def thread(folder: Path, listener: Listener) -> Iterator[EngineThread]:
    thread = EngineThread(partial(build_engine, options(folder)), listener.publish, max_queued=2, grace_s=0.0)
    thread.start()
    while thread.phase in (EnginePhase.LOADING, EnginePhase.WARMING):
        thread.join(0.01)
    yield thread
    thread.drain()
    thread.join(PATIENCE_S)


def endless() -> Sequence:
    return Sequence((1, 2, 3), SamplingParams(max_new_tokens=10**9), deadline_s=PATIENCE_S)


def short() -> Sequence:
    return Sequence((1, 2, 3), SamplingParams(max_new_tokens=3), deadline_s=PATIENCE_S)


def test_a_sequence_runs_and_ends_once(thread: EngineThread, listener: Listener) -> None:
    assert thread.phase is EnginePhase.READY
    assert thread.info is not None
    assert thread.info.num_slots == 2
    sequence = short()
    thread.submit(sequence)
    listener.wait(lambda: bool(listener.ends[sequence]))
    thread.cancel(sequence)
    figures = ask(thread)
    assert [end.reason for end in listener.ends[sequence]] == [FinishReason.LENGTH]
    assert figures.prompt_tokens == 3, "the warm-up was counted"
    assert figures.generated_tokens == 3


def test_the_queue_is_bounded_and_a_refusal_says_when_to_come_back(thread: EngineThread, listener: Listener) -> None:
    taken = [endless() for _ in range(4)]  # two slots and two places in the queue
    for sequence in taken:
        thread.submit(sequence)
    with pytest.raises(QueueFull) as caught:
        thread.submit(endless())
    assert 1 <= caught.value.retry_after_s <= 60
    for sequence in taken:
        thread.cancel(sequence)
    listener.wait(lambda: all(listener.ends[sequence] for sequence in taken))
    assert {end.reason for sequence in taken for end in listener.ends[sequence]} == {FinishReason.CANCELLED}
    figures = ask(thread)
    assert (figures.running, figures.queued) == (0, 0)


def test_draining_ends_everybody_and_then_the_thread(thread: EngineThread, listener: Listener) -> None:
    taken = [endless() for _ in range(3)]
    for sequence in taken:
        thread.submit(sequence)
    listener.wait(lambda: listener.tokens[taken[0]] > 3)
    thread.drain()
    assert thread.phase is EnginePhase.DRAINING
    with pytest.raises(NotServing):
        thread.submit(endless())
    thread.join(PATIENCE_S)
    assert [[end.reason for end in listener.ends[sequence]] for sequence in taken] == [[FinishReason.SHUTDOWN]] * 3


def test_weights_that_compute_something_else_are_never_served(tmp_path: Path, listener: Listener) -> None:
    from model import checkpoint
    from tests.checkpoints import tiny_files, tiny_model

    files = tiny_files(tiny_model(seed=0))
    other = tiny_files(tiny_model(seed=1))  # sound weights, but not those that the record was written with
    checkpoint.save(tmp_path / "mixed", {**files, "model.safetensors": other["model.safetensors"]})
    thread = EngineThread(
        partial(build_engine, options(tmp_path / "mixed")), listener.publish, max_queued=2, grace_s=0.0
    )
    thread.start()
    thread.join(PATIENCE_S)
    assert thread.phase is EnginePhase.FAILED
    assert thread.failure is not None
    assert "known answer" in thread.failure


def test_slots_that_do_not_fit_are_refused_with_the_numbers(folder: Path, listener: Listener) -> None:
    wanted = EngineOptions(folder, "cpu", threads=1, slots=100_000, kv_memory_mib=1, prefill_chunk=16)
    thread = EngineThread(partial(build_engine, wanted), listener.publish, max_queued=2, grace_s=0.0)
    thread.start()
    thread.join(PATIENCE_S)
    assert thread.failure is not None
    assert "--slots is 100000" in thread.failure
    assert "--kv-memory-mib" in thread.failure


def ask(thread: EngineThread) -> Figures:
    answered: list[Figures] = []
    arrived = threading.Event()

    def reply(figures: Figures) -> None:
        answered.append(figures)
        arrived.set()

    thread.figures(reply)
    assert arrived.wait(PATIENCE_S)
    return answered[0]
