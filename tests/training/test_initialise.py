"""Every init gives the variance that it claims, from the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.checkpoints import tiny_model
from training.config import CHOICES, TrainingConfig
from training.initialise import SWITCH_SCALE, initialise, is_zero_at_first

# Every kind of matrix with enough weights to measure; no two of a kind have as many inputs as outputs.
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 256,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "expert_size": 128,
}
GROUPS: dict[str, Any] = {"num_experts": 64, "experts_per_token": 4, "num_groups": 32, "groups_per_token": 2}


def filled(init: str) -> Transformer:
    model = Transformer(ModelConfig(**SIZES, **GROUPS, activation="relu"))
    initialise(model, 5, init)
    return model


@pytest.mark.parametrize("init", CHOICES["init"])
def test_every_matrix_has_the_variance_that_the_init_claims(init: str) -> None:
    for name, parameter in filled(init).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        outputs, inputs = parameter.shape[-2:]
        claimed = {
            "zero_output": 0.0 if is_zero_at_first(name) else 1 / inputs,
            "kaiming": 2 / inputs,
            "xavier": 2 / (inputs + outputs),
            "truncated_normal": 0.1 / inputs,
        }[init]
        claimed = 1.0 if name == "embedding.weight" else claimed
        tolerance = 6 * (2 / parameter.numel()) ** 0.5  # six deviations of a normal's sample variance
        assert parameter.var().item() == pytest.approx(claimed, rel=tolerance), name
        assert abs(parameter.mean().item()) <= 6 * (claimed / parameter.numel()) ** 0.5, name


def test_what_is_zero_at_first_is_what_writes_to_the_stream_and_what_chooses() -> None:
    zero = [name for name, parameter in filled("zero_output").named_parameters() if not parameter.any()]
    layer = ["attention.out.weight", "moe.router.weight", "moe.router.group_weight", "moe.experts.down"]
    assert zero == [*(f"layers.0.{name}" for name in layer), "head.weight"]


def test_a_truncated_normal_ends_at_two_deviations() -> None:
    weights = filled("truncated_normal").layers[0].moe.experts.down
    std = (SWITCH_SCALE / 128) ** 0.5
    assert 2.25 * std < weights.abs().max() < 2.28 * std  # two deviations before the variance was mended


@pytest.mark.parametrize("init", CHOICES["init"])
def test_initial_weights_depend_on_the_seed_alone(init: str) -> None:
    first, second, third = tiny_model(0), tiny_model(1), tiny_model(0)
    for model, seed in ((first, 5), (second, 5), (third, 6)):
        initialise(model, seed, init)
    same = [torch.equal(parameter, second.get_parameter(name)) for name, parameter in first.named_parameters()]
    assert all(same)
    assert not torch.equal(first.embedding.weight, third.embedding.weight)


def test_the_default_is_zero_output() -> None:
    assert TrainingConfig().init == "zero_output"
