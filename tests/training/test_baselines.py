"""The bigram baseline by hand, and bits that do not depend on how a text was cut into tokens."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.training.processes import VERSE, assert_refused_here, said, train_here, training
from training import config as configs
from training import corpora
from training.baselines import bigram_loss, bits_per_character
from training.history import History
from training.trainer import Trainer


def test_the_bigram_loss_is_the_hand_computed_one() -> None:
    train, validation = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 1, 2])
    # 0 is followed by 1 twice, so P(1 | 0) = 3/5; 1 by 0 and by 1 once each, so P(2 | 1) = 1/5.
    expected = -(math.log(3 / 5) + math.log(1 / 5)) / 2
    assert bigram_loss(train, validation, vocab_size=3) == pytest.approx(expected)


def test_a_bigram_that_has_seen_nothing_guesses_uniformly() -> None:
    assert bigram_loss(torch.tensor([0, 0]), torch.tensor([3, 1, 2]), 4) == pytest.approx(math.log(4))


def test_a_vocabulary_of_millions_needs_no_table_of_its_pairs() -> None:
    last = 4_999_999  # a table of float64 would take 200 TB, more than a process can address
    train, validation = torch.tensor([0, last, 0, last]), torch.tensor([0, last, 7])
    expected = -(math.log(3 / 5_000_002) + math.log(1 / 5_000_001)) / 2
    assert bigram_loss(train, validation, vocab_size=5_000_000) == pytest.approx(expected)


def test_what_a_run_has_to_beat_is_known_before_its_first_step(text: Path) -> None:
    trainer = Trainer(
        configs.from_preset("tiny", {}), corpora.from_file(text), text.parent / "run", torch.device("cpu")
    )
    expected = bigram_loss(trainer.train_ids, trainer.validation_ids, trainer.tokenizer.vocab_size)
    trainer.validation_ids = trainer.validation_ids.flip(0)  # too late to be counted
    assert trainer.bigram_loss == expected


def test_bits_per_character_count_characters_and_not_tokens() -> None:
    assert bits_per_character(math.log(2), num_tokens=7, num_characters=7) == pytest.approx(1)
    assert bits_per_character(math.log(2), num_tokens=7, num_characters=14) == pytest.approx(0.5)


def test_a_run_its_card_and_its_evaluation_stand_beside_the_bigram_of_its_own_text(text: Path) -> None:
    folder = train_here(text, "beside")
    facts = json.loads((folder / "training.json").read_text())
    tokenizer, cut = Tokenizer.of_characters(VERSE), int(0.9 * len(VERSE))
    counted, scored = (torch.tensor(tokenizer.encode(part)) for part in (VERSE[:cut], VERSE[cut:]))
    assert facts["bigram_loss"] == pytest.approx(bigram_loss(counted, scored, tokenizer.vocab_size), abs=1e-5)
    assert facts["bits_per_character"] == pytest.approx(facts["validation_loss"] / math.log(2), abs=1e-4)
    output, _ = training("evaluate", "--checkpoint", folder, "--data", text, cwd=text.parent).communicate(timeout=60)
    for shown in (output, (folder / "README.md").read_text()):
        for figure, unit in (("bits_per_character", " bits per character"), ("bigram_loss", " nats")):
            told = [float(number) for number in re.findall(rf"(\d+\.\d+){unit}", shown)]
            assert any(number == pytest.approx(facts[figure], abs=2e-4) for number in told), figure


def test_a_milestone_is_passed_per_character_and_not_per_token() -> None:
    of_bytes, of_pairs = History(), History()
    of_bytes.remember(1.5, 1.5, 10, 10, tokens_per_character=1.2)
    of_pairs.remember(3.0, 3.0, 10, 10, tokens_per_character=0.5)
    assert of_bytes.milestones == {}  # 1.8 nats a character
    assert set(of_pairs.milestones) == {"1.7439"}  # 1.5


@pytest.mark.usefixtures("corpus")  # it loads the true one as well
def test_a_file_that_is_called_as_a_corpus_is_not_taken_for_it(text: Path) -> None:
    """Its model would be scored on text that it has never seen, under its own text's name."""
    file = text.rename(text.with_name("tinyshakespeare"))
    folder = train_here(file, "namesake")
    assert_refused_here("trained on another text", "evaluate", "--checkpoint", folder, cwd=text.parent)


def test_a_text_whose_training_part_cannot_be_spelled_is_scored_without_a_bigram(text: Path) -> None:
    train_here(text, "foreign")
    (text.parent / "foreign.txt").write_text("\u00e9" + VERSE)
    asked = ("evaluate", "--checkpoint", "runs/foreign/step-20", "--data", "foreign.txt")
    code, output = said(*asked, cwd=text.parent)
    assert code == 0
    assert "bigram counts    none: of the training text, the vocabulary has no U+00E9 at 0" in output
