"""Noise that anyone can compute again, filters that equal transformers', draws that follow the model."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from model.generate import sampling_options
from model.sampling import _GOLDEN, SamplingBatch, _mix, draw, likely, log_probabilities, uniform
from tests.evidence import At, Evidence

CPU = torch.device("cpu")


def splitmix(seed: int, position: int) -> float:
    """The same noise in plain integers, written from the definition."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    return (mix((mix((seed + golden) & mask) + position * golden) & mask) >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**63 - 1])
def test_the_noise_is_what_plain_integers_give(seed: int) -> None:
    positions = [0, 1, 2, 255, 65_536, 10**12]
    drawn = uniform(torch.full((len(positions),), seed), torch.tensor(positions)).tolist()
    assert drawn == [splitmix(seed, position) for position in positions]


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of splitmix64 seeded with 1234567, as published with the generator's reference code.
    states = 1234567 + torch.arange(1, 4) * _GOLDEN
    assert [z % 2**64 for z in _mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_the_noise_is_uniform_across_seeds_and_positions() -> None:
    noise = uniform(torch.arange(400).repeat_interleave(400), torch.arange(400).repeat(400))
    counts = torch.histc(noise.float(), bins=64, min=0, max=1)
    chi_square = ((counts - 2500) ** 2 / 2500).sum().item()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    assert abs(torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1].item()) < 0.01


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (7, 0.8, 0.0), (65, 0.999, 0.0)),
        *((0, 1.0, 0.02), (0, 1.0, 1.0), (12, 0.9, 0.1)),
    ],
)
def test_filters_equal_transformers(top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 65, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    reals = torch.tensor([top_p, min_p], dtype=torch.float64).expand(200, 2).unbind(1)
    kept = likely(logits.double(), torch.full((200,), top_k), *reals)
    assert torch.equal(kept > 0, expected > -torch.inf)


def test_log_probabilities_are_those_of_the_raw_distribution_and_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    told, ids, best = log_probabilities(logits, torch.tensor([0, 3]), num_alternatives=3)
    expected = logits.double().softmax(-1).log()
    assert told.tolist() == pytest.approx([expected[0, 0].item(), math.log(0.25)], abs=1e-12)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert best[0].tolist() == pytest.approx([expected[0, i].item() for i in (1, 2, 0)], abs=1e-12)
    assert log_probabilities(logits, torch.tensor([0, 3]), num_alternatives=10)[1].shape == (2, 4)


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    options = sampling_options(CPU, 0.0, 0, 1.0, 7)
    drawn = draw(logits, _repeated(options, 2), torch.tensor([3, 4]))
    assert drawn.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(1.0, 0, 1.0, 0.0), (0.8, 20, 0.95, 0.0), (1.5, 0, 1.0, 0.05)]
)
def test_frequencies_follow_the_model(
    at: At, evidence: Evidence, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square over the ids at a level of 1e-6, over positions of one seed and over seeds at one position."""
    num_draws = at(50_000, 1_000_000)
    logits = torch.randn(65, generator=torch.Generator().manual_seed(3)) * 1.5
    options = _repeated(sampling_options(CPU, temperature, top_k, top_p, 11, min_p), num_draws)
    same, running = torch.full((num_draws,), 300), torch.arange(num_draws)
    kept = likely(
        logits.double()[None] / temperature, *(each[:1] for each in (options.top_k, options.top_p, options.min_p))
    )[0]
    expected = kept / kept.sum() * num_draws
    for seeds, positions in ((options.seed, running), (running, same)):
        drawn = draw(logits.expand(num_draws, -1), replace(options, seed=seeds), positions)
        level = chi_square_level(torch.bincount(drawn, minlength=65), expected)
        assert level > 1e-6
        evidence(f"level of {num_draws:,} draws", round(level, 4))


def chi_square_level(observed: Tensor, expected: Tensor) -> float:
    """How probable a larger chi-square would be if the expectation were right (Pearson 1900)."""
    assert not observed[expected == 0].any()
    often = expected >= 5
    chi_square = ((observed - expected) ** 2 / expected)[often].sum()
    freedom = often.sum() - 1
    return float(torch.special.gammaincc(freedom / 2, chi_square.float() / 2))


def test_the_chi_square_sees_a_sampler_that_is_wrong_by_a_few_percent() -> None:
    expected = torch.full((65,), 1000.0, dtype=torch.float64)
    observed = expected.clone()
    assert chi_square_level(observed, expected) == pytest.approx(1.0)
    observed[:32] *= 1.1
    assert chi_square_level(observed, expected) < 1e-6


def test_what_the_filters_drop_is_never_drawn() -> None:
    num_draws = 5000
    logits = torch.randn(65, generator=torch.Generator().manual_seed(3))
    options = _repeated(sampling_options(CPU, 2.0, 3, 0.9, 5), num_draws)
    drawn = draw(logits.expand(num_draws, -1), options, torch.arange(num_draws))
    assert set(drawn.tolist()) <= set(logits.topk(3).indices.tolist())


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    logits = torch.randn(16, 65)
    options = _repeated(sampling_options(CPU, 1.0, 0, 0.95, 2**62), 16)
    positions = torch.arange(16) * 1000
    together = draw(logits, options, positions)
    alone = [
        draw(logits[row : row + 1], sampling_options(CPU, 1.0, 0, 0.95, 2**62), positions[row : row + 1]).item()
        for row in range(16)
    ]
    assert together.tolist() == alone


def _repeated(options: SamplingBatch, times: int) -> SamplingBatch:
    return SamplingBatch(**{f.name: getattr(options, f.name).repeat(times) for f in fields(options)})
