"""What the engine tells of a step and of itself. Plain data; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.sequence import Event, Phase, Sequence

Delivery = tuple[Sequence, tuple[Event, ...]]


@dataclass(frozen=True)
class StepReport:
    """What one call of the model brought: events by sequence, and how long it took in all for so many steps.

    phase is None when the model did not run.
    """

    events: tuple[Delivery, ...]
    phase: Phase | None = None
    seconds: float = 0.0
    batch_size: int = 0
    steps: int = 1


@dataclass(frozen=True)
class Figures:
    """One consistent copy of what the engine counts, taken between two steps. taken_at is in time.monotonic seconds.

    expert_counts (2, L, E) and routed_tokens (2, L) are by phase (prefill, decode); gate_weight (L, E).
    """

    taken_at: float
    expert_counts: npt.NDArray[np.int64]
    gate_weight: npt.NDArray[np.float64]
    routed_tokens: npt.NDArray[np.int64]
    running: int = 0
    queued: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
