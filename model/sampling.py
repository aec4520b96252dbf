"""Drawing the next token: temperature, top-k, top-p, min-p, then inverse CDF with stateless noise. Knows no model.

A draw is a pure function of (logits, options, seed, position), so a text can be made again from its seed anywhere.

Letters: B rows, V vocabulary, A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the splitmix64 increment, as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


@dataclass(frozen=True)
class SamplingBatch:
    """The options of B rows, each a tensor (B,): temperature, top_p and min_p float64, top_k and seed int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) for each pair of seed and position (int64), float64 with 53 random bits.

    splitmix64 (Steele, Lea and Flood 2014) of the position, in a stream chosen by the mixed seed.
    """
    return _shift(_mix(_mix(seed + _GOLDEN) + position * _GOLDEN), 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits: Tensor, options: SamplingBatch, positions: Tensor) -> Tensor:
    """Draw one token for each row: logits (B, V), absolute positions (B,) of the drawn tokens -> ids (B,).

    Ties go to the lower id. Temperature 0 takes the largest logit.
    """
    greedy = options.temperature == 0
    temperature = torch.where(greedy, 1.0, options.temperature)
    probabilities = likely(logits.double() / temperature[:, None], options.top_k, options.top_p, options.min_p)
    cumulative = probabilities.cumsum(-1)
    threshold = uniform(options.seed, positions)[:, None] * cumulative[:, -1:]
    # The first id whose cumulative mass exceeds the threshold; an id without mass never does so first.
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    drawn = torch.minimum(drawn, _last_possible(probabilities))
    return torch.where(greedy, logits.argmax(dim=-1), drawn)


def likely(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (not renormalised) of the ids that top-k, top-p, min-p keep; 0 for others. scores (B, V) float64.

    Each filter equals transformers' warper of its name: top-p keeps the fewest best ids whose mass reaches top_p, min-p
    those at least min_p times as likely as the best one.
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    beyond_k = (top_k > 0)[:, None] & (ranks >= top_k[:, None])
    mass = ranked.masked_fill(beyond_k, -torch.inf).softmax(dim=-1)
    beyond_p = (top_p < 1)[:, None] & (mass.cumsum(-1) - mass >= top_p[:, None])
    beyond = beyond_p | (mass < min_p[:, None] * mass[:, :1])
    return torch.zeros_like(mass).scatter(-1, order, mass.masked_fill(beyond, 0.0))


def log_probabilities(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the raw distribution, before temperature and filters, float64.

    logits (B, V), token_ids (B,) -> that of each row's token (B,), the likeliest ids (B, A) and theirs (B, A). A is
    num_alternatives or the whole vocabulary; ties go to the lower id.
    """
    logprobs = logits.double().log_softmax(dim=-1)
    best, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return logprobs.gather(-1, token_ids[:, None]).squeeze(-1), ids[:, :num_alternatives], best[:, :num_alternatives]


def _last_possible(probabilities: Tensor) -> Tensor:
    """The highest id with any mass, for thresholds that rounding pushed past the end."""
    ids = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return torch.where(probabilities > 0, ids, 0).amax(dim=-1)
