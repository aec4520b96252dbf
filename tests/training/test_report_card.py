"""The model card: the words for its figures, and Markdown that no text breaks."""

from __future__ import annotations

import dataclasses
import json

import pytest
from markdown_it import MarkdownIt

from model import checkpoint
from tests.training.processes import ROOT
from training.corpora import Corpus
from training.record import training_section
from training.report.card import card, reading


def test_the_reading_names_the_dearest_and_the_cheapest_expert() -> None:
    causal = {"cost": [[0.01, 0.5], [0.02, -0.001]], "standard_error": [[0.01, 0.01], [0.001, 0.01]]}
    sentence = reading(causal)
    assert "expert 1 of layer 0 costs most, +0.5000" in sentence
    assert "expert 1 of layer 1 costs least, -0.0010" in sentence
    assert "for 2 of 4" in sentence
    of_one_window = {"cost": [[0.5, 0.5]], "standard_error": [[None, None]]}
    assert reading(of_one_window).endswith("+0.5000; one window gives no standard error.")


@pytest.mark.parametrize("passage", ["plain", "` and ```"])
def test_whatever_a_model_writes_its_card_is_one_table_and_whole_code(passage: str) -> None:
    """As Markdown is read: every token comes back from its cell, and no sample ends its own block."""
    shown = {
        "\n\n": r"\n\n",
        " |": "\u2423|",
        "|": "|",
        "`": "`",
        "a``|b": "a``|b",
        "\\": "\\",
        "\\|": "\\|",
        " the ": "\u2423the\u2423",
        "\t\u2028": r"\t\u2028",
        "bytes:\\xc3": "bytes:\\xc3",
    }
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    report["favourites"] = [[[{"token": token, "lift": 2.0, "taken": 0.5}] for token in shown]] * 2
    report["overlap"]["passage"] = passage
    report["samples"] = [f"a list:\n{passage}\n```\ncode\n```", "the second"]
    read = MarkdownIt("commonmark").enable("table").parse(card("any", checkpoint.read_config(folder), facts, report))
    codes = [child.content for token in read for child in token.children or [] if child.type == "code_inline"]
    assert codes[-2 * len(shown) - 1 :] == [*shown.values(), *shown.values(), repr(passage)]
    assert [token.content.strip() for token in read if token.type == "fence"] == report["samples"]


def test_the_shipped_card_is_made_of_its_own_record_and_report_and_the_pages_tell_its_loss() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    assert report["fingerprint"] == checkpoint.verify(folder).fingerprint
    assert card("shakespeare", checkpoint.read_config(folder), facts, report) == (folder / "README.md").read_text()
    for page in ("README.md", "docs/training.md"):
        assert f"**{facts['validation_loss']:.4f}**" in (ROOT / page).read_text(), page


def test_published_figures_are_told_of_the_text_that_they_are_of() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, shape = json.loads((folder / "training.json").read_text()), checkpoint.read_config(folder)
    assert "- below 1.7439 nats per character by step 200" in training_section(shape, facts)
    facts["corpus"] = {"name": "shakespeare", "sha256": Corpus("shakespeare", "a", "b").digests}  # a file's name
    assert "- below" not in training_section(shape, facts)


def test_a_card_of_too_many_experts_says_why_it_tells_nothing_of_each() -> None:
    folder = ROOT / "checkpoints" / "shakespeare"
    facts, report = (json.loads((folder / name).read_text()) for name in ("training.json", "report.json"))
    report |= {"favourites": None, "classes": None, "causal_map": None}
    shape = dataclasses.replace(checkpoint.read_config(folder), num_experts=1024)
    assert "is told of at most 512 experts" in card("any", shape, facts, report)
