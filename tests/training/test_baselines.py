"""The bigram baseline by hand, and bits that do not depend on how a text was cut into tokens."""

from __future__ import annotations

import math

import pytest
import torch

from training.baselines import bigram_loss, bits_per_character


def test_the_bigram_loss_is_the_hand_computed_one() -> None:
    train, validation = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 1, 2])
    # 0 is followed by 1 twice, so P(1 | 0) = 3/5; 1 by 0 and by 1 once each, so P(2 | 1) = 1/5.
    expected = -(math.log(3 / 5) + math.log(1 / 5)) / 2
    assert bigram_loss(train, validation, vocab_size=3) == pytest.approx(expected)


def test_a_bigram_that_has_seen_nothing_guesses_uniformly() -> None:
    assert bigram_loss(torch.tensor([0, 0]), torch.tensor([3, 1, 2]), 4) == pytest.approx(math.log(4))


def test_bits_per_character_count_characters_and_not_tokens() -> None:
    assert bits_per_character(math.log(2), num_tokens=7, num_characters=7) == pytest.approx(1)
    assert bits_per_character(math.log(2), num_tokens=7, num_characters=14) == pytest.approx(0.5)
