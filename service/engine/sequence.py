"""One request's life inside the engine: what was asked, what was drawn, how it ended. Knows no tensors and no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

ExpertsPerLayer = tuple[tuple[int, ...], ...]
WeightsPerLayer = tuple[tuple[float, ...], ...]


class Phase(StrEnum):
    """What a step did with a token that it fed to the model."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a sequence ended. The values are the words on the wire and in the metrics."""

    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"
    TIMEOUT = "timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    CANCELLED = "cancelled"
    STALLED = "stalled"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"
    NON_FINITE = "non_finite"


BY_ITSELF = frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.EOS})
"""A sequence that was left alone ends for one of these."""
TELLS_ALL = BY_ITSELF | {FinishReason.TIMEOUT}
"""One that ends as a sequence should has told all of its text."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    The seed fixes every draw. ``disabled_experts`` are (layer, expert) that this sequence does without.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    disabled_experts: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)  # frozen would take 1.0 us a token more to make
class DrawnToken:
    """One drawn token and what of the text it adds. The routing is that of the position it was drawn from:
    [layer][experts_per_token]. Logarithms are natural and of the raw distribution."""

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    routed_experts: ExpertsPerLayer | None = None
    expert_weights: WeightsPerLayer | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing but its text is told."""
        return self.top_logprobs is None and self.routed_experts is None


@dataclass(frozen=True)
class Ended:
    """The last event of a sequence. expert_counts is [layer][expert] over all routed tokens; times are in seconds."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    routed_tokens: int
    expert_counts: tuple[tuple[int, ...], ...]
    queue_s: float
    ttft_s: float | None
    total_s: float


Event = DrawnToken | Ended


@dataclass(eq=False)
class Sequence:
    """A prompt and what has become of it. Compared by identity: two equal requests are two sequences.

    num_prefilled counts the prompt's ids that the model has read, num_fed all that it has read: drawn ones too.
    num_taken is written by whoever reads the events, and read by the engine: with more than max_unread tokens that
    nobody has taken, the sequence is paused. ``spell`` is called once for each drawn id, in order, for what it adds to
    the text, and ``spell_rest`` when no more will be drawn, for what still lacks bytes.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    return_routed_experts: bool = False
    deadline_s: float = 300.0
    queue_deadline_s: float = 300.0
    num_logprobs: int | None = None
    max_unread: int | None = None
    spell: Callable[[int], str] = field(default=lambda token_id: "", repr=False)
    spell_rest: Callable[[], str] = field(default=lambda: "", repr=False)

    created_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    paused_at: float | None = None
    slot: int | None = None
    num_prefilled: int = 0
    num_fed: int = 0
    num_taken: int = 0
    token_ids: list[int] = field(default_factory=list)
    held: list[DrawnToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        assert self.params.max_new_tokens >= 1
        assert self.prompt_ids, "an empty prompt is a newline by the time it gets here"

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.prompt_ids)

    @property
    def is_paused(self) -> bool:
        return self.max_unread is not None and len(self.token_ids) - self.num_taken >= self.max_unread

    @property
    def may_be_unread(self) -> int | None:
        """How many more tokens may be drawn before somebody reads one; None for any number."""
        return None if self.max_unread is None else self.max_unread - (len(self.token_ids) - self.num_taken)

    @property
    def expires_at(self) -> float:
        """When its time is over; sooner while it waits for a slot."""
        is_waiting = self.admitted_at is None
        return self.created_at + (min(self.deadline_s, self.queue_deadline_s) if is_waiting else self.deadline_s)

    def end_record(
        self, reason: FinishReason, now: float, routed_tokens: int, expert_counts: tuple[tuple[int, ...], ...]
    ) -> Ended:
        """What is told of it last. Ends nothing."""
        admitted_at = now if self.admitted_at is None else self.admitted_at
        return Ended(
            reason=reason,
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.token_ids),
            routed_tokens=routed_tokens,
            expert_counts=expert_counts,
            queue_s=admitted_at - self.created_at,
            ttft_s=None if self.first_token_at is None else self.first_token_at - self.created_at,
            total_s=now - self.created_at,
        )
