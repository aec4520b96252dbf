"""Lists of one item a line: how they are split, trained on, and written anew."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from tests.training.processes import assert_refused_here, assert_refused_in_one_line, said, train, train_here, training
from training import config as configs
from training import corpora
from training.config import BadConfig
from training.evaluate import evaluate
from training.sample import items

NAMES = [
    "".join(parts) for parts in itertools.product(["ba", "ke", "lo", "mi", "su"], ["ra", "no", "ti", "vel"], "ansy")
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(names: Path) -> Path:
    train(names, "names", "--items", "--steps", 60, "--evaluate-every", 60)
    return names.parent / "runs" / "names" / "step-60"


def test_a_list_is_split_by_items_and_shuffled(names: Path) -> None:
    corpus = corpora.items_from_file(names)
    for part in (corpus.train, corpus.validation):
        assert (part[0], part[-1]) == ("\n", "\n")
        assert "\n\n" not in part
    seen, held_out = corpus.train.split(), corpus.validation.split()
    assert (len(seen), len(held_out)) == (72, 8)
    assert sorted(seen + held_out) == sorted(NAMES)
    assert seen != [name for name in NAMES if name in seen], "a sorted list would be learnt in its order"
    assert held_out != NAMES[72:]
    assert corpora.items_from_file(names) == corpus


def test_no_item_is_in_both_parts_however_often_it_is_listed(tmp_path: Path) -> None:
    lines = [f"  name {index % 30}\t" for index in range(200)]
    (tmp_path / "names.txt").write_text("\r\n\r\n".join(lines))
    corpus = corpora.items_from_file(tmp_path / "names.txt")
    seen, held_out = corpus.train.split("\n")[1:-1], corpus.validation.split("\n")[1:-1]
    assert sorted(seen + held_out) == sorted(line.strip() for line in lines)
    assert not set(seen) & set(held_out)
    assert len(set(held_out)) == 3


def test_a_flag_that_is_true_or_false_takes_no_word() -> None:
    parser = argparse.ArgumentParser()
    configs.add_flags(parser)
    for line, value in (["--items"], {"items": True}), (["--no-items"], {"items": False}), ([], {}):
        assert configs.flag_values(parser.parse_args(line)) == value
    assert configs.from_preset("tiny", {"items": True}).items
    with pytest.raises(BadConfig, match="items is 2"):
        configs.from_preset("tiny", {"items": 2})


def test_a_run_on_items_is_scored_on_the_items_that_it_has_not_seen(trained: Path, names: Path) -> None:
    loaded, corpus = checkpoint.load(trained), corpora.items_from_file(names)
    assert loaded.training["config"]["items"] is True
    assert loaded.training["corpus"] == {"name": "names", "sha256": corpus.digests}
    loss = evaluate(loaded.model, torch.tensor(loaded.tokenizer.encode(corpus.validation))).loss
    assert loss == pytest.approx(loaded.training["validation_loss"], abs=1e-4)
    _, output = said("evaluate", "--checkpoint", trained, "--data", names, cwd=names.parent)
    assert f"validation loss  {loss:.4f}" in output


def test_new_items_are_written_and_the_known_ones_marked(trained: Path, names: Path) -> None:
    arguments = ("sample", "--checkpoint", trained, "--items", 40, "--data", names, "--seed", 5)
    first, _ = training(*arguments, cwd=names.parent).communicate(timeout=60)
    assert said(*arguments, cwd=names.parent) == (0, first)
    *lines, count = first.splitlines()
    assert len(lines) == 40
    known = set(corpora.items_from_file(names).train.split())
    for line in lines:
        name = line.removesuffix(" (known)")
        assert name.strip()
        assert line.endswith(" (known)") == (name in known)
    marked = sum(line.endswith(" (known)") for line in lines)
    assert 0 < marked < 40
    assert count == f"40 items, {marked} of them known from the training text"


@pytest.mark.parametrize(
    ("of_items", "listed", "message"), [(False, NAMES, "was not trained on items"), (True, NAMES[1:], "another text")]
)
def test_items_are_asked_of_who_was_trained_on_these(
    trained: Path, names: Path, tmp_path: Path, of_items: bool, listed: list[str], message: str
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(listed))
    folder = trained if of_items else train_here(tmp_path / "list.txt", "whole", "--steps", 2, "--evaluate-every", 2)
    asked = ("sample", "--checkpoint", folder, "--items", 3, "--data", "list.txt")
    assert_refused_here(message, *asked, cwd=tmp_path)


def test_an_item_ends_at_its_length_and_a_model_that_writes_only_empty_ones_is_given_up(trained: Path) -> None:
    loaded = checkpoint.load(trained)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    written = list(items(loaded.model, loaded.tokenizer, 5, 2, **options))
    assert [len(item) <= 2 for item in written] == [True] * 5
    newline = loaded.tokenizer.encode("\n")[0]
    loaded.model.head.weight.zero_()  # uniform, so that the lowest id wins
    assert newline == 0
    greedy = {**options, "temperature": 0.0}
    assert list(items(loaded.model, loaded.tokenizer, 5, 2, **greedy)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "tiny", "--items"], "add --data FILE"),
        (["sample", "--items", "0"], "--items is 0"),
        (["sample", "--items", "3"], "--data FILE"),
        (["sample", "--items", "3", "--data", "names.txt", "an"], "no prompt"),
    ],
)
def test_items_without_a_list_are_refused_in_one_line(names: Path, arguments: list[str], message: str) -> None:
    assert_refused_in_one_line(message, *arguments, cwd=names.parent)
