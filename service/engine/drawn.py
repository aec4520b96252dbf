"""What a step drew: as tensors where it was drawn, and row by row for those who asked.

Letters: T steps of one call, B rows, L layers, K experts per token, A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from torch import Tensor

from service.engine.sequence import DrawnToken, Sequence

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
        token = DrawnToken(len(sequence.token_ids), token_id, sequence.spell(token_id))
        if sequence.num_logprobs is not None and self.logprobs and self.top_ids and self.top_logprobs:
            likeliest = zip(self.top_ids[step][row], self.top_logprobs[step][row], strict=True)
            token.logprob = self.logprobs[step][row]
            token.top_logprobs = tuple(islice(likeliest, sequence.num_logprobs))
        if sequence.return_routed_experts and self.expert_ids and self.expert_weights:
            token.routed_experts = frozen(self.expert_ids[step][row])
            token.expert_weights = frozen(self.expert_weights[step][row])
        return token


def frozen(rows: list[list[T]]) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(row) for row in rows)
