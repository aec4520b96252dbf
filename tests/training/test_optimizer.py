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
from training.optimizer import POLAR_EXPRESS, Muon, Optimizer, polar_factor, schedule
from training.products import fast_products, onednn_keeps_float32


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


@pytest.mark.parametrize("rows", [64, 256, 6144])
def test_products_of_a_step_keep_float32_whatever_units_the_processor_has(rows: int) -> None:
    fine = torch.full((rows, 256), 1 + 2**-20)
    with fast_products(torch.device("cpu")):
        assert torch.equal(fine @ torch.eye(256), fine)


def test_products_are_fast_within_a_step_alone_even_if_it_raises() -> None:
    """What is scored afterwards is multiplied as everywhere."""
    products = cast(Any, torch.backends.mkldnn).matmul
    with suppress(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert products.fp32_precision == ("bf16" if onednn_keeps_float32() else "none")
        raise ZeroDivisionError
    assert products.fp32_precision == "none"


def test_two_steps_of_muon_are_the_hand_written_ones() -> None:
    """Of a stack and of a matrix of the same shape, which are orthogonalised together, while the momentum rises."""
    generator = torch.Generator().manual_seed(0)
    weights = {"stack": torch.randn(2, 96, 64, generator=generator), "one": torch.randn(96, 64, generator=generator)}
    expected = {name: weight.clone() for name, weight in weights.items()}
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    muon = Muon(weights, learning_rate=0.02, weight_decay=0.1)
    for number, beta in ((100, 0.9), (300, 0.95)):  # half-way up, and at its height
        for name, weight in weights.items():
            weight.grad = torch.randn(weight.shape, generator=generator)
            momentum[name] = beta * momentum[name] + (1 - beta) * weight.grad
            direction = (1 - beta) * weight.grad + beta * momentum[name]
            moved = 0.01 * (96 / 64) ** 0.5 * polar_factor(direction.view(-1, 96, 64)).view_as(weight)
            expected[name] = expected[name] * (1 - 0.01 * 0.1) - moved
        muon.step(number, factor=0.5)
    torch.testing.assert_close(weights, expected)


def test_adam_moves_choosers_and_the_rest_by_their_own_rates_and_decays_none() -> None:
    """Its first step is as long as its rate, whatever the gradient (Kingma and Ba 2015, section 2.1)."""
    model = tiny_model(num_groups=2, groups_per_token=2)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    config = TrainingConfig(embedding_learning_rate=0.008, head_learning_rate=0.004, weight_decay=0.5)
    Optimizer(model, config).step(0, factor=0.5)
    moved = {name: (first[name] - parameter).detach() for name, parameter in model.named_parameters()}
    by_rate = [
        [name for name, step in moved.items() if torch.allclose(step, torch.tensor(rate), atol=1e-6)]
        for rate in (0.004, 0.002)
    ]
    norms = [name for name in moved if "norm" in name]
    assert by_rate[0] == ["embedding.weight", *norms]
    assert by_rate[1] == [*(name for name in moved if ".router." in name), "head.weight"]


def test_the_polar_factor_keeps_directions_and_its_polynomials_are_the_best_from_a_thousandth_up() -> None:
    """The error of the best polynomial is as large above one as below (Amsel et al. 2025)."""

    def composed(values: torch.Tensor) -> torch.Tensor:
        for a, b, c in POLAR_EXPRESS:
            values = a * values + b * values**3 + c * values**5
        return values

    reached = composed(torch.logspace(-3, 0, 100_000, dtype=torch.float64))
    assert 1 - reached.min().item() == pytest.approx(reached.max().item() - 1, rel=1e-6)
    matrix = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = u @ torch.diag_embed(composed(values / (1.01 * matrix.norm()))) @ v
    torch.testing.assert_close(polar_factor(matrix), expected, rtol=1e-3, atol=1e-4)


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
