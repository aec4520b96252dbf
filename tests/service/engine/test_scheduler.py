"""Slots are given in order and given back; prompts and running streams take turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.scheduler import READING_S, DecodePlan, PrefillPlan, Scheduler
from service.engine.sequence import SamplingParams, Sequence


def sequence(length: int = 3) -> Sequence:
    return Sequence(tuple(range(length)), SamplingParams(), deadline_s=60.0)


def run(scheduler: Scheduler, now: float = 0.0) -> PrefillPlan | DecodePlan | None:
    """One step without a model: every plan is carried out at once."""
    scheduler.admit(now)
    plan = scheduler.schedule(now)
    if isinstance(plan, PrefillPlan):
        for chunk in plan.chunks:
            chunk.sequence.num_prefilled += chunk.num_tokens
    return plan


def test_the_longest_waiting_get_the_lowest_free_slots() -> None:
    scheduler = Scheduler(num_slots=2, prefill_chunk=16)
    first, second, third = sequence(), sequence(), sequence()
    for one in (first, second, third):
        scheduler.add(one)
    scheduler.admit(now=5.0)
    assert (first.slot, second.slot, third.slot) == (0, 1, None)
    assert first.admitted_at == 5.0
    scheduler.release(first)
    scheduler.admit(now=6.0)
    assert (third.slot, first.slot) == (0, None)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_free_slots) == (2, 0, 0)


def test_a_waiting_sequence_can_be_taken_out() -> None:
    scheduler = Scheduler(num_slots=1, prefill_chunk=16)
    first, second = sequence(), sequence()
    scheduler.add(first)
    scheduler.add(second)
    scheduler.admit(now=0.0)
    scheduler.release(second)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_prompts_and_running_streams_take_turns_by_time(chunks: int) -> None:
    """A chunk takes so long that just so many begin within a turn; a step takes nothing."""
    scheduler, now = Scheduler(num_slots=4, prefill_chunk=16), 0.0
    scheduler.add(sequence())
    run(scheduler)
    assert run(scheduler) == DecodePlan(tuple(scheduler.running)), "nobody waits: let it go on"
    for length in (64, 3, 200):
        scheduler.add(sequence(length))
    turns: list[int] = [0]
    while (plan := run(scheduler, now)) and (isinstance(plan, PrefillPlan) or plan.somebody_waits):
        if isinstance(plan, PrefillPlan):
            turns[-1] += 1
            now += READING_S / (chunks - 0.5)
        else:
            assert all(each.is_prefilled for each in plan.sequences)
            turns.append(0)
    assert sum(turns) == 4 + 1 + 13
    assert turns[:-1] == [chunks] * (len(turns) - 1)
    assert 1 <= turns[-1] <= chunks


def test_the_shapes_of_a_prompt_depend_on_its_length_alone() -> None:
    def shapes(others: int) -> list[tuple[int, int, int]]:
        scheduler = Scheduler(num_slots=8, prefill_chunk=32)
        for _ in range(others):
            scheduler.add(sequence())
            run(scheduler)
        prompt = sequence(length=70)
        scheduler.add(prompt)
        plans = [run(scheduler) for _ in range(16)]
        chunks = [chunk for plan in plans if isinstance(plan, PrefillPlan) for chunk in plan.chunks]
        return [(each.start, each.num_tokens, each.num_rows) for each in chunks if each.sequence is prompt]

    assert shapes(0) == shapes(5) == [(0, 32, 32), (32, 32, 32), (64, 6, 16)]


@pytest.mark.parametrize(
    ("room", "expected"),
    [(96, [[64, 10, 20], [36, 60], [1]]), (0, [[64], [36], [10], [20], [60], [1]])],
)
def test_as_many_prompts_are_read_together_as_there_is_room_for_and_the_oldest_in_any_case(
    room: int, expected: list[list[int]]
) -> None:
    scheduler = Scheduler(num_slots=8, prefill_chunk=64)
    for length in (100, 10, 20, 60, 1):
        scheduler.add(sequence(length))
    scheduler.admit(now=0.0)
    told = []
    while isinstance(plan := scheduler.schedule(now=0.0, most_prompt_tokens=room), PrefillPlan):
        told.append([chunk.num_tokens for chunk in plan.chunks])
        assert plan.sequences == tuple(chunk.sequence for chunk in plan.chunks if chunk.completes_the_prompt)
        for chunk in plan.chunks:
            chunk.sequence.num_prefilled += chunk.num_tokens
    assert told == expected


def test_small_chunks_keep_a_step_short_however_many_prompts_wait() -> None:
    scheduler = Scheduler(num_slots=8, prefill_chunk=16)
    for _ in range(5):
        scheduler.add(sequence(40))
    scheduler.admit(now=0.0)
    plan = scheduler.schedule(now=0.0, most_prompt_tokens=256)
    assert isinstance(plan, PrefillPlan)
    assert [chunk.num_tokens for chunk in plan.chunks] == [16, 16]


def test_nothing_to_do_is_no_plan() -> None:
    assert run(Scheduler(num_slots=1, prefill_chunk=16)) is None


def test_scheduler_and_sequence_never_load_torch() -> None:
    modules = "service.engine.scheduler, service.engine.sequence, service.engine.thread"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"
