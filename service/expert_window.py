"""What the experts did lately: differences between copies of counts that only grow, and the figures that follow.

Plain arrays; knows no web and no Prometheus. Letters: P phases (prefill, decode), L layers, E experts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.config import ModelConfig
from service.engine.reports import Figures

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

LONGEST_S: Final = 600
SNAPSHOT_EVERY_S: Final = 5
LEAST_TOKENS: Final = 1_000
"""Routed tokens of a layer below which its figures would tell of chance rather than of the router."""


@dataclass(frozen=True)
class ExpertLoad:
    """What the experts did in ``seconds``, the latest of which are ``age_s`` ago.

    tokens (P, L, E), gate_weight (L, E), routed (L,) are counts. share (L, E) is of a layer's work, NaN in a layer
    without any. The figures of layers whose routed tokens are fewer than LEAST_TOKENS are NaN, and no expert of theirs
    is_idle (L, E): entropy_ratio, max_load_ratio, jain, num_idle and drift (L,), which is also NaN without a baseline.
    """

    seconds: float
    age_s: float
    tokens: Counts
    gate_weight: Floats
    routed: Counts
    share: Floats
    entropy_ratio: Floats
    max_load_ratio: Floats
    jain: Floats
    is_idle: npt.NDArray[np.bool_]
    num_idle: Floats
    drift: Floats


class ExpertWindow:
    """The ring of figures, one for every SNAPSHOT_EVERY_S of the last LONGEST_S. clock in time.monotonic seconds."""

    def __init__(
        self, config: ModelConfig, baseline: Floats | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        layers, experts = config.num_layers, config.num_experts
        nothing = np.zeros((2, layers, experts), np.int64)
        self.baseline = baseline
        self._clock = clock
        self.start = Figures(clock(), nothing, np.zeros((layers, experts)), np.zeros((2, layers), np.int64))
        # One more than fit in the longest window, since a window begins with the figures before it.
        self._ring = deque([self.start], maxlen=LONGEST_S // SNAPSHOT_EVERY_S + 2)

    def keep(self, figures: Figures) -> None:
        """Remember these, for windows to begin with; to be called every SNAPSHOT_EVERY_S."""
        if figures.taken_at > self._ring[-1].taken_at:
            self._ring.append(figures)

    def load(self, latest: Figures | None, seconds: float | None) -> ExpertLoad:
        """What happened from ``seconds`` ago, or since the start, until ``latest``, which is None before the first.

        The window is as long as asked for or up to SNAPSHOT_EVERY_S longer, but for a process that is younger.
        """
        now = self._clock()
        latest = latest or self.start
        first = self.start if seconds is None else self._last_before(now - seconds)
        tokens = latest.expert_counts - first.expert_counts
        routed = (latest.routed_tokens - first.routed_tokens).sum(axis=0)
        counts = tokens.sum(axis=0)
        with np.errstate(invalid="ignore"):
            share = counts / counts.sum(axis=-1, keepdims=True)
        is_enough = routed >= LEAST_TOKENS
        told = np.where(is_enough[:, None], share, np.nan)
        is_idle = (counts == 0) & is_enough[:, None]
        return ExpertLoad(
            seconds=now - first.taken_at,
            age_s=now - latest.taken_at,
            tokens=tokens,
            gate_weight=latest.gate_weight - first.gate_weight,
            routed=routed,
            share=share,
            entropy_ratio=entropy_ratio(told),
            max_load_ratio=told.max(axis=-1) * told.shape[-1],
            jain=1 / (told.shape[-1] * np.square(told).sum(axis=-1)),
            is_idle=is_idle,
            num_idle=np.where(is_enough, is_idle.sum(axis=-1), np.nan),
            drift=np.full(len(told), np.nan) if self.baseline is None else divergence(told, self.baseline),
        )

    def _last_before(self, moment: float) -> Figures:
        """The newest that are as old as that; the oldest where none are."""
        return next((one for one in reversed(self._ring) if one.taken_at <= moment), self._ring[0])


def entropy(share: Floats) -> Floats:
    """In bits: (..., E) -> (...). What is never chosen adds nothing; NaN stays NaN."""
    bits: Floats = np.log2(np.where(share == 0, 1.0, share))
    return np.asarray(0.0 - (share * bits).sum(axis=-1))  # a minus alone would make -0 of nothing


def entropy_ratio(share: Floats) -> Floats:
    """Entropy over that of an even load, (..., E) -> (...): 1 is even, 0 is one of several doing it all."""
    if share.shape[-1] == 1:  # the only expert's load is even, and its entropy nothing
        return np.asarray(share[..., 0])
    return np.asarray(entropy(share) / np.log2(share.shape[-1]))


def divergence(share: Floats, baseline: Floats) -> Floats:
    """Jensen-Shannon divergence, base 2: (..., E) twice -> (...). 0 for the same shares, 1 for none in common.

    Lin 1991: the entropy of the mean less the mean of the entropies.
    """
    mean_of_entropies = (entropy(share) + entropy(baseline)) / 2
    return np.asarray(np.maximum(0.0, entropy((share + baseline) / 2) - mean_of_entropies))
