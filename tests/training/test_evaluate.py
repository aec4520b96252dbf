"""Windows of a text: which are scored, and how many at once."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tests.checkpoints import tiny_model
from training.evaluate import evaluate, spread_windows, windows_at_once


def test_windows_are_exact_and_reach_from_the_first_to_the_last() -> None:
    inputs, targets = spread_windows(torch.arange(101), length=10, most=3)
    assert inputs[:, 0].tolist() == [0, 40, 90]
    assert torch.equal(targets, inputs + 1)


def test_a_look_at_a_long_text_scores_windows_all_over_it_and_few_tokens_at_once() -> None:
    model = tiny_model(vocab_size=2**14)
    scored: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: scored.append(inputs[0]))
    ids = torch.arange(32 * 300 + 1) % 2**14
    assert evaluate(model, ids, most_tokens=32 * 200).num_windows == 200
    windows = torch.cat(scored)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == ids[-2]
    assert windows[:, 0].diff().unique().tolist() == [32, 64]
    # 2^26 logits of 16,384 tokens each are 128 windows of 32.
    assert [len(each) for each in scored] == [128, 72]
    assert evaluate(model, ids).num_windows == 300
    assert evaluate(model, ids, most_tokens=1).num_windows == 1
    config = dataclasses.replace(model.config, context_length=2**13)
    assert windows_at_once(config) == 1
