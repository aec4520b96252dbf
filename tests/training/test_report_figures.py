"""What a report measures, against cases worked by hand."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import tiny_model
from training.report import experts
from training.report.overlap import longest_overlap


def test_every_token_has_the_class_of_its_first_character_that_is_no_space() -> None:
    tokens = [
        "\n",
        " ",
        "A",
        "e",
        "t",
        "7",
        "!",
        "é",
        " the",
        " \n",
        "",
        "—",
        "bytes:\\xc3",  # the letters, which are a text
    ]
    named = ["newline", "space", "upper case", "vowel", "consonant", "digit", "punctuation"]
    assert [experts.class_of(token.encode()) for token in tokens] == [
        *named, "vowel", "consonant", "newline", "other", "other", "consonant",
    ]  # fmt: skip
    assert [experts.class_of(part) for part in (b"\xc3", b" \xf0", "о".encode())] == ["other"] * 3


def test_lift_is_one_without_preference_and_the_number_of_experts_for_a_sole_taker() -> None:
    even = experts.lift(torch.tensor([[[3, 6], [3, 6]]]))
    assert even.tolist() == [[[1, 1], [1, 1]]]
    split = experts.lift(torch.tensor([[[8, 0, 0], [0, 8, 0]]]))
    assert split[..., :2].tolist() == [[[2, 0], [0, 2]]]
    assert split[..., 2].isnan().all()


def test_favourites_are_what_an_expert_took_most_of_beyond_its_share() -> None:
    counts = torch.tensor([[[90, 10, 1], [10, 90, 0]]])
    (first, second), = experts.favourites(counts, ["a", "b", "z"], experts_per_token=1)  # fmt: skip
    assert [like["token"] for like in first] == ["a", "z"]  # z has the higher lift, and one occurrence
    assert first[0]["taken"] == 0.9
    assert second == [{"token": "b", "lift": 1.81, "taken": 0.9}]


def test_load_of_a_balanced_and_of_a_collapsed_layer() -> None:
    balanced, collapsed = experts.load(torch.tensor([[5, 5, 5, 5], [0, 0, 20, 0]]))
    assert (balanced["max_load_ratio"], balanced["entropy_ratio"], balanced["idle"]) == (1, 1, 0)
    assert (collapsed["max_load_ratio"], collapsed["entropy_ratio"], collapsed["idle"]) == (4, 0, 3)
    (single,) = experts.load(torch.tensor([[20]]))
    assert (single["max_load_ratio"], single["entropy_ratio"], single["idle"]) == (1, 1, 0)


def test_choices_are_counted_under_the_token_that_was_fed() -> None:
    model = tiny_model()
    inputs = torch.tensor([[3, 3, 7, 9]] * 30)  # more than one batch of windows
    counts = experts.count_choices(model, inputs)
    assert counts.sum((1, 2)).tolist() == [2 * inputs.numel()] * 3
    assert counts.sum(1)[0].nonzero().flatten().tolist() == [3, 7, 9]
    assert counts.sum(1)[0, 3] == 2 * 60
    chosen = model(inputs)[1][0].expert_ids[inputs.flatten() == 9]
    assert counts[0, :, 9].tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()


def test_the_causal_map_is_the_loss_without_an_expert_minus_with_it() -> None:
    model = tiny_model()
    silent = model.layers[1].moe.experts
    with torch.no_grad():
        for weight in silent.parameters():
            weight.zero_()  # a layer whose experts write nothing
    ids = torch.randint(0, 65, (5, 33), generator=torch.Generator().manual_seed(1))
    found = experts.causal_map(model, ids[:, :-1], ids[:, 1:])
    assert found.cost[1].abs().max() < 1e-6
    disabled = torch.zeros(1, 3, 4, dtype=torch.bool)
    disabled[0, 2, 3] = True
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(ids[:, :-1], off)[0].flatten(0, 1), ids[:, 1:].flatten()).item()
            for off in (None, disabled)
        ]
    assert found.baseline == pytest.approx(losses[0], abs=1e-5)
    assert found.cost[2, 3].item() == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert abs(found.cost[2, 3]) > 1e-4


@pytest.mark.parametrize(
    ("sample", "text", "longest"),
    [
        ("abcdef", "xxcdexx", "cde"),
        ("xyz", "abc", ""),
        ("whole", "the whole of it", "whole"),
        ("ab--abc", "abc", "abc"),
        ("", "abc", ""),
    ],
)
def test_the_longest_overlap(sample: str, text: str, longest: str) -> None:
    assert longest_overlap(sample, text) == longest
