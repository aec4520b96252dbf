"""The mailbox: whoever calls from another thread gets an answer, and every sequence ends exactly once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from model import checkpoint
from model.transformer import Transformer
from service.engine.batch import Batch, DecodeBatch, PrefillBatch
from service.engine.counters import ExpertCounters
from service.engine.drawn import Drawn
from service.engine.engine import Engine
from service.engine.loading import MIB, EngineOptions, build_engine
from service.engine.native.runner import NativeRunner
from service.engine.reports import Figures, StepReport
from service.engine.runner import TorchRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import Ended, FinishReason, SamplingParams, Sequence
from service.engine.thread import EngineInfo, EnginePhase, EngineThread, NotServing, QueueFull
from tests.checkpoints import plain_files, tiny_checkpoint, tiny_files, tiny_model

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

    def has_ended(self, sequence: Sequence) -> bool:
        return bool(self.ends[sequence])

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


def test_the_time_before_anybody_came_is_no_reason_to_refuse(folder: Path, listener: Listener) -> None:
    idle_s = 2.0
    thread = EngineThread(
        partial(build_engine, options(folder)), listener.publish, max_queued=8, grace_s=0.0, queue_timeout_s=idle_s
    )
    thread.start()
    while thread.phase is not EnginePhase.READY:
        thread.join(0.01)
    thread.join(idle_s)
    for sequence in [endless() for _ in range(5)]:  # two slots: three of them wait
        thread.submit(sequence)
        listener.wait(lambda: any(listener.tokens.values()))  # the idle time is over, and has been looked at
    thread.drain()
    thread.join(PATIENCE_S)


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
    files = plain_files()
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


@pytest.mark.parametrize("runner", ["torch", "auto"])
def test_the_slots_take_no_more_memory_than_they_may(tmp_path: Path, runner: str) -> None:
    """Of a window that no vector's length divides, for which the native runner keeps a little more."""
    tiny_checkpoint(tmp_path / "odd", context_length=40)
    options = EngineOptions(tmp_path / "odd", "cpu", 1, slots=None, kv_memory_mib=1, prefill_chunk=16, runner=runner)
    engine, info = build_engine(options, lambda _: None)
    assert isinstance(engine.runner, TorchRunner | NativeRunner)
    held = engine.runner.cache.keys.nbytes + engine.runner.cache.values.nbytes
    assert 0.8 * MIB < held <= MIB
    assert 1 < info.num_slots < 64


def test_slots_that_do_not_fit_are_refused_with_the_numbers(folder: Path, listener: Listener) -> None:
    wanted = EngineOptions(folder, "cpu", threads=1, slots=100_000, kv_memory_mib=1, prefill_chunk=16)
    thread = EngineThread(partial(build_engine, wanted), listener.publish, max_queued=2, grace_s=0.0)
    thread.start()
    thread.join(PATIENCE_S)
    assert thread.failure is not None
    assert "--slots is 100000" in thread.failure
    assert "--kv-memory-mib" in thread.failure


class FaultyRunner(TorchRunner):
    """The real runner, but for a step now and then that raises as a broken device does."""

    def __init__(self, model: Transformer, counters: ExpertCounters, is_broken: Callable[[Batch], bool]) -> None:
        super().__init__(model, 2, counters)
        self._is_broken = is_broken

    def run(self, batch: Batch, steps: int) -> Drawn | None:
        if self._is_broken(batch):
            raise RuntimeError("the device is broken")
        return super().run(batch, steps)


def faulty_thread(
    listener: Listener, is_broken: Callable[[Batch], bool], grace_s: float = 0.0, queue_timeout_s: float = 30.0
) -> EngineThread:
    def build(_: Callable[[EnginePhase], None]) -> tuple[Engine, EngineInfo]:
        model = tiny_model().requires_grad_(False)
        counters = ExpertCounters(model.config, 2, model.device)
        engine = Engine(FaultyRunner(model, counters, is_broken), Scheduler(2, 16), counters)
        return engine, EngineInfo("cpu", 1, "faulty", 2, "", 4, "")

    thread = EngineThread(build, listener.publish, max_queued=8, grace_s=grace_s, queue_timeout_s=queue_timeout_s)
    thread.start()
    while thread.phase is EnginePhase.LOADING:
        thread.join(0.01)
    return thread


def test_one_step_that_raises_ends_who_ran_and_the_next_is_served(listener: Listener) -> None:
    broken = [True]
    thread = faulty_thread(listener, lambda batch: isinstance(batch, DecodeBatch) and bool(broken and broken.pop()))
    first, second = short(), short()
    thread.submit(first)
    listener.wait(lambda: bool(listener.ends[first]))
    thread.submit(second)
    listener.wait(lambda: bool(listener.ends[second]))
    assert [end.reason for end in listener.ends[first]] == [FinishReason.INTERNAL]
    assert [end.reason for end in listener.ends[second]] == [FinishReason.LENGTH]
    assert thread.phase is EnginePhase.READY
    thread.drain()
    thread.join(PATIENCE_S)


def test_steps_that_raise_now_and_then_are_no_failure_of_the_engine(listener: Listener) -> None:
    decoded = [0]

    def is_broken(batch: Batch) -> bool:
        decoded[0] += isinstance(batch, DecodeBatch)
        return isinstance(batch, DecodeBatch) and decoded[0] % 20 == 0

    thread = faulty_thread(listener, is_broken)
    for _ in range(5):  # none of them comes to an end of its own
        one = endless()
        thread.submit(one)
        listener.wait(partial(listener.has_ended, one))
        assert [end.reason for end in listener.ends[one]] == [FinishReason.INTERNAL]
    assert thread.phase is EnginePhase.READY
    thread.drain()
    thread.join(PATIENCE_S)


def test_prompts_that_raise_now_and_then_are_none_either_where_nothing_is_decoded(listener: Listener) -> None:
    read = [0]

    def is_broken(batch: Batch) -> bool:
        read[0] += isinstance(batch, PrefillBatch)
        return read[0] % 2 == 0

    thread = faulty_thread(listener, is_broken)
    scored = [Sequence((1, 2, 3), SamplingParams(max_new_tokens=1), deadline_s=PATIENCE_S) for _ in range(10)]
    for one in scored:
        thread.submit(one)
        listener.wait(partial(listener.has_ended, one))
    assert [listener.ends[one][0].reason for one in scored] == [FinishReason.LENGTH, FinishReason.INTERNAL] * 5
    assert thread.phase is EnginePhase.READY
    thread.drain()
    thread.join(PATIENCE_S)


def test_slots_that_are_held_for_long_count_in_the_wait_before_they_are_given_back(listener: Listener) -> None:
    thread = faulty_thread(listener, lambda batch: False, queue_timeout_s=0.5)
    running = [endless(), endless()]
    for one in running:
        thread.submit(one)
    listener.wait(lambda: min(listener.tokens[one] for one in running) > 0)
    thread.join(0.7)  # for longer than anybody may wait they keep their slots
    thread.submit(endless())
    with pytest.raises(QueueFull):
        thread.submit(endless())
    thread.drain()
    thread.join(PATIENCE_S)


def test_an_engine_that_only_raises_fails_and_leaves_nobody_waiting(listener: Listener) -> None:
    thread = faulty_thread(listener, lambda batch: isinstance(batch, DecodeBatch))

    def ended_or_failed(sequence: Sequence) -> bool:
        return bool(listener.ends[sequence]) or thread.phase is EnginePhase.FAILED

    for sequence in [short() for _ in range(8)]:
        with suppress(NotServing):
            thread.submit(sequence)
        listener.wait(partial(ended_or_failed, sequence))
    thread.join(PATIENCE_S)
    assert thread.phase is EnginePhase.FAILED
    assert thread.failure == "the device is broken"
    assert {end.reason for ends in listener.ends.values() for end in ends} == {FinishReason.INTERNAL}
    assert max(map(len, listener.ends.values())) == 1


def test_who_runs_may_finish_within_the_grace_time(listener: Listener) -> None:
    thread = faulty_thread(listener, lambda batch: False, grace_s=PATIENCE_S)
    running = [Sequence((1, 2, 3), SamplingParams(max_new_tokens=300), deadline_s=PATIENCE_S) for _ in range(2)]
    waiting = short()
    for sequence in (*running, waiting):
        thread.submit(sequence)
    listener.wait(lambda: listener.tokens[running[1]] > 2)
    thread.drain()
    thread.join(PATIENCE_S)
    assert [end.reason for sequence in running for end in listener.ends[sequence]] == [FinishReason.LENGTH] * 2
    assert [end.reason for end in listener.ends[waiting]] == [FinishReason.SHUTDOWN]
    assert ask(thread).generated_tokens == 600, "figures are answered after the end as well"


def test_what_arrives_while_the_engine_reads_its_mail_is_ended_by_a_drain(
    thread: EngineThread, listener: Listener
) -> None:
    late = short()

    def submit_and_drain(_: Figures) -> None:
        def both() -> None:
            thread.submit(late)
            thread.drain()

        other = threading.Thread(target=both)
        other.start()
        other.join()

    thread.figures(submit_and_drain)
    thread.join(PATIENCE_S)
    assert [end.reason for end in listener.ends[late]] == [FinishReason.SHUTDOWN]


def test_a_caller_that_raises_or_cancels_strangers_harms_nobody(thread: EngineThread, listener: Listener) -> None:
    def raising(_: Figures) -> None:
        raise RuntimeError("nobody is here any more")

    thread.figures(raising)
    thread.cancel(short())
    sequence = short()
    thread.submit(sequence)
    listener.wait(lambda: bool(listener.ends[sequence]))
    assert [end.reason for end in listener.ends[sequence]] == [FinishReason.LENGTH]


def test_time_runs_out_for_a_running_sequence(thread: EngineThread, listener: Listener) -> None:
    sequence = Sequence((1, 2, 3), SamplingParams(max_new_tokens=10**9), deadline_s=0.2)
    thread.submit(sequence)
    listener.wait(lambda: bool(listener.ends[sequence]))
    assert [end.reason for end in listener.ends[sequence]] == [FinishReason.TIMEOUT]


def ask(thread: EngineThread) -> Figures:
    answered: list[Figures] = []
    arrived = threading.Event()

    def reply(figures: Figures) -> None:
        answered.append(figures)
        arrived.set()

    thread.figures(reply)
    assert arrived.wait(PATIENCE_S)
    return answered[0]
