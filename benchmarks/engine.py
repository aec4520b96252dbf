"""The engine alone, in a process of its own that computes nothing between two trials. Knows no HTTP."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from benchmarks.workload import Request, Workload
from model.tokenizer import Tokenizer
from service.engine.loading import EngineOptions, build_engine
from service.engine.sequence import Phase, SamplingParams, Sequence
from service.engine.thread import EngineInfo

if TYPE_CHECKING:
    from service.engine.engine import Engine


@dataclass(frozen=True)
class EngineTrial:
    """One closed loop. The decode rate is of the steps in which every stream drew a token, None without any."""

    tokens: int
    tokens_per_second: float
    decode_rate: float | None
    cpu_seconds: float


class EngineProcess:
    """The near end of the process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.info: EngineInfo = connection.recv()

    def trial(self, workload: Workload, streams: int) -> EngineTrial:
        self._connection.send((workload, streams))
        trial: EngineTrial = self._connection.recv()
        return trial


@contextmanager
def engine_process(options: EngineOptions) -> Iterator[EngineProcess]:
    """Raises EOFError when the process dies; it has said why."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_answer_trials, args=(far, options), daemon=True)
    process.start()
    far.close()
    try:
        yield EngineProcess(near)
    finally:
        near.close()
        process.join()


def _answer_trials(connection: Connection, options: EngineOptions) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as python -m service does, before torch is loaded
    engine, info = build_engine(options, lambda phase: None)
    tokenizer = Tokenizer.load(options.checkpoint)
    connection.send(info)
    while True:
        try:
            workload, streams = connection.recv()
        except EOFError:
            return
        closed_loop(engine, tokenizer, workload.warm_up().queues(tokenizer.tokens, streams))
        connection.send(closed_loop(engine, tokenizer, workload.queues(tokenizer.tokens, streams)))


def closed_loop(engine: Engine, tokenizer: Tokenizer, queues: list[list[Request]]) -> EngineTrial:
    """Run all requests, as many at a time as there are queues; each end lets its queue's next request in."""
    waiting = [[_sequence(tokenizer, request) for request in queue] for queue in queues]
    queue_of = {queue.pop(0): queue for queue in waiting}
    decoded, decode_s = 0, 0.0
    started, cpu_started = time.perf_counter(), time.process_time()
    for first in queue_of:
        engine.add(first)
    while engine.has_work:
        report = engine.step()
        if report.phase is Phase.DECODE and report.batch_size == len(queues):
            decoded, decode_s = decoded + report.batch_size * report.steps, decode_s + report.seconds
        for sequence, _ in report.events:
            if sequence.is_finished and (queue := queue_of.pop(sequence)):
                following = queue.pop(0)
                queue_of[following] = queue
                engine.add(following)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    tokens = sum(request.new_tokens for queue in queues for request in queue)
    return EngineTrial(tokens, tokens / seconds, decoded / decode_s if decoded else None, cpu_seconds)


def _sequence(tokenizer: Tokenizer, request: Request) -> Sequence:
    params = SamplingParams(request.new_tokens, seed=request.seed)
    return Sequence(tuple(tokenizer.encode(request.prompt)), params)
