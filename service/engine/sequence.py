"""One request's life inside the engine: what was asked, what was drawn, how it ended. Knows no tensors and no HTTP."""

from __future__ import annotations

import time
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

    LENGTH = "length"
    EOS = "eos"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"
    NON_FINITE = "non_finite"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off. The seed fixes every draw."""

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class DrawnToken:
    """One drawn token. The routing is that of the position it was drawn from: [layer][experts_per_token]."""

    index: int
    token_id: int
    routed_experts: ExpertsPerLayer | None = None
    expert_weights: WeightsPerLayer | None = None


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
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    return_routed_experts: bool = False
    deadline_s: float = 300.0

    created_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    slot: int | None = None
    num_prefilled: int = 0
    num_fed: int = 0
    token_ids: list[int] = field(default_factory=list)
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
    def expires_at(self) -> float:
        return self.created_at + self.deadline_s
