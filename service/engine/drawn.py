"""What a step drew: as tensors where it was drawn, and row by row for those who asked.

Letters: T steps of one call, B rows, L layers, K experts per token, A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from service.engine.sequence import DrawnToken, ExpertsPerLayer, Sequence, WeightsPerLayer

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """What some steps drew: token_ids, is_finite (T, B) and the routing they were drawn from, both (T, B, L, K).

    Where any row wants them, logprobs are those of the drawn tokens (T, B), the likeliest ids (T, B, A), and theirs.
    """

    token_ids: Tensor
    is_finite: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class Rows:
    """The same as plain lists, step by step and row by row; what no sequence of the batch asked for is not fetched."""

    token_ids: list[list[int]]
    is_finite: list[list[bool]]
    expert_ids: list[list[list[list[int]]]] | None
    expert_weights: list[list[list[list[float]]]] | None
    logprobs: list[list[float]] | None
    top_ids: list[list[list[int]]] | None
    top_logprobs: list[list[list[float]]] | None

    @classmethod
    def of(cls, drawn: Drawn, sequences: tuple[Sequence, ...]) -> Rows:
        routed = any(sequence.return_routed_experts for sequence in sequences)
        logprobs, top_ids, top_logprobs = (each.tolist() for each in drawn.logprobs) if drawn.logprobs else (None,) * 3
        return cls(
            drawn.token_ids.tolist(),
            drawn.is_finite.tolist(),
            drawn.expert_ids.tolist() if routed else None,
            drawn.expert_weights.tolist() if routed else None,
            logprobs,
            top_ids,
            top_logprobs,
        )

    @property
    def num_steps(self) -> int:
        return len(self.token_ids)

    def token(self, step: int, row: int, sequence: Sequence) -> DrawnToken:
        token_id = self.token_ids[step][row]
        logprob, top_logprobs = self._logprobs(step, row, sequence.num_logprobs)
        expert_ids, expert_weights = self._routing(step, row) if sequence.return_routed_experts else (None, None)
        return DrawnToken(
            index=len(sequence.token_ids),
            token_id=token_id,
            text=sequence.spell(token_id),
            logprob=logprob,
            top_logprobs=top_logprobs,
            routed_experts=expert_ids,
            expert_weights=expert_weights,
        )

    def _routing(self, step: int, row: int) -> tuple[ExpertsPerLayer, WeightsPerLayer]:
        assert self.expert_ids is not None
        assert self.expert_weights is not None
        return frozen(self.expert_ids[step][row]), frozen(self.expert_weights[step][row])

    def _logprobs(
        self, step: int, row: int, count: int | None
    ) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
        if count is None or self.logprobs is None:
            return None, None
        assert self.top_ids is not None
        assert self.top_logprobs is not None
        best = tuple(zip(self.top_ids[step][row][:count], self.top_logprobs[step][row][:count], strict=True))
        return self.logprobs[step][row], best


def frozen(rows: list[list[T]]) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(row) for row in rows)
