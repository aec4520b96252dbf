"""Chooses which sequences run next. Knows slots, lengths and the time; has never heard of tensors or HTTP."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from service.engine.sequence import Phase, Sequence

READING_S = 0.02
"""So long, and one call of the runner more, running streams wait at most while prompts are read."""
# A prompt's last chunk is padded to a multiple of this, so that its shape depends on the prompt's length alone.
PREFILL_ROWS = 16


@dataclass(frozen=True)
class Chunk:
    """num_tokens of one prompt, from position start on, padded to num_rows."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_rows: int

    @property
    def completes_the_prompt(self) -> bool:
        return self.start + self.num_tokens == len(self.sequence.prompt_ids)


@dataclass(frozen=True)
class PrefillPlan:
    """Feed a chunk of each of some prompts."""

    chunks: tuple[Chunk, ...]
    phase: Phase = Phase.PREFILL

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that draw a token, because their prompts are read then."""
        return tuple(chunk.sequence for chunk in self.chunks if chunk.completes_the_prompt)


@dataclass(frozen=True)
class DecodePlan:
    """Feed the last drawn token of every sequence; for a short while only if somebody waits for a prompt to be read."""

    sequences: tuple[Sequence, ...]
    somebody_waits: bool = False
    phase: Phase = Phase.DECODE


Plan = PrefillPlan | DecodePlan


class Scheduler:
    """The queue, the slots, and whose turn it is. First come, first served.

    Prompts are read first, as many as READING_S has room for, at least a chunk: whoever waits for a first token waits
    for those before it, and what then is drawn is drawn for a fuller house.
    """

    def __init__(self, num_slots: int, prefill_chunk: int) -> None:
        assert num_slots >= 1
        assert prefill_chunk % PREFILL_ROWS == 0
        self.num_slots = num_slots
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._free = list(range(num_slots))  # a heap: the lowest slot is taken first
        self._reading_since: float | None = None  # None when the last step was running streams'

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> list[Sequence]:
        """All that have not ended: the running ones, then the waiting ones."""
        return [*self._running, *self._waiting]

    @property
    def waiting(self) -> list[Sequence]:
        return list(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        return list(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self, now: float) -> None:
        """Give free slots to those who have waited longest."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            sequence.admitted_at = now
            self._running.append(sequence)

    def schedule(self, now: float, most_prompt_tokens: int = 0) -> Plan | None:
        """The next step: a chunk of each of the oldest unread prompts, or one token for everybody else, in turn.

        Several prompts together have most_prompt_tokens at most, and two chunks at most: who asks for small ones wants
        steps to be short. A paused sequence keeps its slot and is passed over. None when nobody else is there.
        """
        prompts = [sequence for sequence in self._running if not sequence.is_prefilled]
        decoding = tuple(each for each in self._running if each.is_prefilled and not each.is_paused)
        has_time_to_read = self._reading_since is None or now - self._reading_since < READING_S
        if prompts and (has_time_to_read or not decoding):
            self._reading_since = now if self._reading_since is None else self._reading_since
            return PrefillPlan(tuple(self._chunks(prompts, min(most_prompt_tokens, 2 * self._prefill_chunk))))
        self._reading_since = None
        return DecodePlan(decoding, somebody_waits=bool(prompts)) if decoding else None

    def holds(self, sequence: Sequence) -> bool:
        return sequence in self._running or sequence in self._waiting

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its slot is free for the next."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        assert sequence.slot not in self._free
        self._running.remove(sequence)
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = None

    def _chunks(self, prompts: list[Sequence], most: int) -> Iterator[Chunk]:
        """Of the first of the prompts one, and of those after it as long as there is room."""
        for number, sequence in enumerate(prompts):
            chunk = self._chunk(sequence)
            most -= chunk.num_tokens
            if number and most < 0:
                return
            yield chunk

    def _chunk(self, sequence: Sequence) -> Chunk:
        num_tokens = min(self._prefill_chunk, len(sequence.prompt_ids) - sequence.num_prefilled)
        return Chunk(sequence, sequence.num_prefilled, num_tokens, num_tokens + -num_tokens % PREFILL_ROWS)
