"""A step of the optimizer is the hand-written one, and one that is restored goes on."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, cast

import pytest
import torch

from model.transformer import Transformer
from tests.checkpoints import tiny_model
from training.config import TrainingConfig
from training.optimizer import Muon, Optimizer, polar_factor, schedule
from training.trainer import fast_products


def test_an_optimizer_that_is_restored_goes_on_where_its_model_is(device: torch.device) -> None:
    def stepped(model: Transformer, number: int, state: dict[str, torch.Tensor] | None = None) -> Optimizer:
        optimizer = Optimizer(model, TrainingConfig())
        if state is not None:
            optimizer.restore(state)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(number, factor=1.0)
        return optimizer

    model = tiny_model().to(device)
    state = {name: tensor.cpu() for name, tensor in stepped(model, 0).state().items()}  # as a file tells it
    other = copy.deepcopy(model)
    stepped(other, 1, state)
    assert all(tensor.device.type == device.type for tensor in other.parameters())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other.state_dict(), model.state_dict())
    stepped(model, 1, {name: tensor.to(device) for name, tensor in state.items()})
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_clipped_step_sees_gradients_of_the_norm_that_was_asked_for() -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = Optimizer(model, TrainingConfig(clip_norm=0.5))
    optimizer.step(0, factor=0.0)
    state = optimizer.state()
    seen = [tensor / 0.1 for name, tensor in state.items() if name.startswith("adamw.exp_avg.")]
    seen += [tensor / 0.15 for name, tensor in state.items() if name.startswith("muon.")]
    assert sum(tensor.numel() for tensor in seen) == model.config.num_parameters
    assert torch.cat([tensor.flatten() for tensor in seen]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_products_are_fast_within_a_step_alone_even_if_it_raises() -> None:
    """What is scored afterwards is multiplied as everywhere."""
    products = cast(Any, torch.backends.mkldnn).matmul
    with suppress(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert products.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert products.fp32_precision == "none"


def test_one_step_of_muon_is_the_hand_written_one() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1))
    first = weight.detach().clone()
    with torch.no_grad():
        Muon({"w": weight}, learning_rate=0.02, weight_decay=0.1).step(0, factor=0.5)
    direction = 0.15 * weight.grad + 0.85 * 0.15 * weight.grad
    expected = first * (1 - 0.01 * 0.1) - 0.01 * (96 / 64) ** 0.5 * polar_factor(direction)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 64), (2, 64, 96)])
def test_the_polar_factor_is_near_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    factor = polar_factor(matrices)
    values = torch.linalg.svdvals(factor)
    # Four steps bring all but the smallest singular values near one, and never turn a direction round.
    assert 0.6 < values.median() < 1.3
    assert values.max() < 1.6
    assert (torch.einsum("nio,nij,njo->no", u, factor, v.mT) > 0).all()


def test_the_schedule_rises_stays_and_falls_to_zero() -> None:
    factors = [schedule(step, 100, warmup_steps=10, warmdown_share=0.6) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:40] == [1.0] * 30
    assert factors[100] == 0
    assert factors == sorted(factors[:40]) + sorted(factors[40:], reverse=True)
