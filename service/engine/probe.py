"""Tries at start-up whether a sequence's numbers depend on its company: on this machine, with this model and threads.

What makes a row's bits its own depends on the library's kernels, so it is measured and not assumed.
"""

from __future__ import annotations

from service.engine.batch import build_batch
from service.engine.drawn import Rows
from service.engine.runner import Runner
from service.engine.scheduler import PREFILL_ROWS, Chunk, DecodePlan, PrefillPlan
from service.engine.sequence import DrawnToken, SamplingParams, Sequence

STEPS = 8
PROMPT_LENGTH = PREFILL_ROWS + 3


def find_row_multiple(runner: Runner, num_slots: int, vocab_size: int) -> int | None:
    """The smallest multiple of rows, or else the full house, with which texts are bitwise equal alone and in a crowd.

    The runner is left with it; None when there is none. Leaves finite numbers in the slots' caches, and counts.
    """
    for multiple in sorted({4, 8, 16, num_slots + -num_slots % 4}):
        runner.pad_rows_to(multiple)
        alone = _trace(runner, num_slots=1, vocab_size=vocab_size)
        sizes = sorted({num_slots, 1 + num_slots // 5, 1 + num_slots // 2})
        if all(trace == alone[0] for size in sizes for trace in _trace(runner, size, vocab_size)):
            return multiple
    runner.pad_rows_to(4)
    return None


def _trace(runner: Runner, num_slots: int, vocab_size: int) -> list[list[DrawnToken]]:
    """What the same sequence draws in the first, the middle and the last row of so many; others are read in between."""
    sequences = [_stranger(slot, vocab_size) for slot in range(num_slots)]
    places = sorted({0, num_slots // 2, num_slots - 1})
    bystanders = [slot for slot in range(num_slots) if slot not in places]
    told: list[list[DrawnToken]] = [[] for _ in places]
    for place in places:
        sequences[place] = _probe(place, vocab_size)
    for events, token in zip(told, _read(runner, [sequences[place] for place in places]), strict=True):
        events.append(token)
    for step in range(STEPS):
        drawn = runner.run(build_batch(DecodePlan(tuple(sequences)), runner.layout), steps=1)
        assert drawn is not None
        rows = Rows(drawn, tuple(sequences))
        tokens = [rows.token(0, row, sequence) for row, sequence in enumerate(sequences)]
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.token_ids.append(token.token_id)
            sequence.num_fed += 1
        for events, place in zip(told, places, strict=True):
            events.append(tokens[place])
        if bystanders and step == STEPS // 2:
            _read(runner, [_stranger(bystanders[0], vocab_size)])
    return told


def _read(runner: Runner, sequences: list[Sequence]) -> list[DrawnToken]:
    """Prefill whole prompts in two chunks, together where the runner can; the first token of each, who has none yet."""
    told: list[DrawnToken] = []
    for group in [sequences] if runner.most_prompt_tokens else [[sequence] for sequence in sequences]:
        for start, count in ((0, PREFILL_ROWS), (PREFILL_ROWS, PROMPT_LENGTH - PREFILL_ROWS)):
            chunks = tuple(Chunk(sequence, start, count, PREFILL_ROWS) for sequence in group)
            drawn = runner.run(build_batch(PrefillPlan(chunks), runner.layout), steps=1)
        assert drawn is not None
        rows = Rows(drawn, tuple(group))
        for row, sequence in enumerate(group):
            told.append(rows.token(0, row, sequence))
            sequence.token_ids, sequence.num_fed = [told[-1].token_id], PROMPT_LENGTH
    return told


def _probe(slot: int, vocab_size: int) -> Sequence:
    prompt_ids = tuple(5 * index % vocab_size for index in range(PROMPT_LENGTH))
    return Sequence(
        prompt_ids, SamplingParams(seed=1), return_routed_experts=True, num_logprobs=min(10, vocab_size), slot=slot
    )


def _stranger(slot: int, vocab_size: int) -> Sequence:
    """Somebody else in the middle of a text."""
    prompt_ids = tuple((7 * slot + 3 * index) % vocab_size for index in range(PROMPT_LENGTH))
    return Sequence(prompt_ids, SamplingParams(seed=slot), slot=slot, token_ids=[slot % vocab_size], num_fed=slot)
