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


class Rows:
    """The same as plain lists, step by step and row by row; what no sequence of the batch asked for is not fetched."""

    def __init__(self, drawn: Drawn, sequences: tuple[Sequence, ...]) -> None:
        self.token_ids: list[list[int]] = drawn.token_ids.tolist()
        self.is_finite: list[list[bool]] = drawn.is_finite.tolist()
        is_routing_asked = any(sequence.return_routed_experts for sequence in sequences)
        self._routing = [drawn.expert_ids.tolist(), drawn.expert_weights.tolist()] if is_routing_asked else []
        self._logprobs = [each.tolist() for each in drawn.logprobs or ()]

    def token(self, step: int, row: int, sequence: Sequence) -> DrawnToken:
        token_id = self.token_ids[step][row]
        token = DrawnToken(len(sequence.token_ids), token_id, sequence.spell(token_id))
        if sequence.num_logprobs is not None:
            token.logprob, top_ids, top_logprobs = (each[step][row] for each in self._logprobs)
            token.top_logprobs = tuple(islice(zip(top_ids, top_logprobs, strict=True), sequence.num_logprobs))
        if sequence.return_routed_experts:
            token.routed_experts, token.expert_weights = (frozen(each[step][row]) for each in self._routing)
        return token


def frozen(rows: list[list[T]]) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(row) for row in rows)
