"""The losses that balance experts, against cases computed by hand, finite differences and counted frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.router import Noise, Router, Routing
from training.balance import (
    chance_of_choice,
    importance,
    importance_loss,
    load,
    load_loss,
    squared_variation,
    switch_loss,
    z_loss,
)


def routing(logits: Tensor, experts_per_token: int, noise: Noise | None = None) -> Routing:
    chosen = logits.topk(experts_per_token, dim=-1)
    return Routing(logits, chosen.indices, chosen.values.softmax(-1), noise=noise)


def phi(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_the_switch_loss_is_one_at_balance_and_num_experts_over_those_chosen_at_collapse() -> None:
    balanced = torch.eye(4).repeat(5, 1) * 50  # every token is sure, and every expert has as many
    assert switch_loss(routing(balanced, 1)).item() == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(20, 1)
    assert switch_loss(routing(collapsed, 1)).item() == pytest.approx(4)
    assert switch_loss(routing(collapsed, 2)).item() == pytest.approx(2)  # nobody can have more than half the choices


def test_the_z_loss_is_the_squared_log_partition_function() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2) / 2
    torch.testing.assert_close(z_loss(routing(logits, 1)), expected)


def test_importance_is_the_sum_of_gates_and_its_loss_their_squared_variation() -> None:
    log3 = math.log(3)
    logits = torch.tensor([[log3, 0.0, -9.0], [log3, -9.0, 0.0]])  # gates 3/4 and 1/4 of the two best
    torch.testing.assert_close(importance(routing(logits, 2)), torch.tensor([1.5, 0.25, 0.25]))
    # Mean 2/3, variance ((5/6)^2 + 2 (5/12)^2) / 3 = 25/72, over 4/9.
    assert importance_loss(routing(logits, 2)).item() == pytest.approx(25 / 32)


@pytest.mark.parametrize(("amounts", "expected"), [([3.0, 1], 0.25), ([2.0, 2, 2], 0), ([8.0, 0, 0, 0], 3), ([5.0], 0)])
def test_squared_variation(amounts: list[float], expected: float) -> None:
    """Of E experts when one does it all: E - 1."""
    assert squared_variation(torch.tensor(amounts)).item() == pytest.approx(expected)


def test_the_chance_of_choice_is_that_of_beating_the_kth_best_of_the_others() -> None:
    noisy = torch.tensor([[3.0, 2.0, 1.0]])
    added = torch.tensor([[0.5, -0.5, 0.25]])
    std = torch.tensor([[1.0, 2.0, 0.5]])
    first = [phi((2.5 - 2) / 1), phi((2.5 - 3) / 2), phi((0.75 - 3) / 0.5)]
    second = [phi((2.5 - 1) / 1), phi((2.5 - 1) / 2), phi((0.75 - 2) / 0.5)]
    torch.testing.assert_close(chance_of_choice(noisy, added, std, 1), torch.tensor([first]))
    torch.testing.assert_close(chance_of_choice(noisy, added, std, 2), torch.tensor([second]))
    assert (chance_of_choice(noisy, added, std, 3) == 1).all()


def test_load_is_the_sum_of_those_chances_and_its_loss_their_squared_variation() -> None:
    noisy = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.5]])
    added = torch.tensor([[0.5, -0.5, 0.25], [0.0, 1.0, 0.5]])
    std = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]])
    # Two of three: to be among them is to beat the lesser of the two others.
    expected = [
        phi((2.5 - 1) / 1) + phi((1.0 - 2.5) / 2),
        phi((2.5 - 1) / 2) + phi((2.0 - 1) / 1),
        phi((0.75 - 2) / 0.5) + phi((2.0 - 1) / 0.5),
    ]
    found = routing(noisy, 2, Noise(added, std))
    torch.testing.assert_close(load(found), torch.tensor(expected))
    mean = sum(expected) / 3
    assert load_loss(found).item() == pytest.approx(sum((each - mean) ** 2 for each in expected) / 3 / mean**2)


def test_an_experts_chance_is_the_frequency_with_which_it_is_chosen_over_new_noise_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, std = torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.3
    added = std * torch.randn(5, generator=generator)
    draws = 40_000
    for k in (1, 2, 4):
        computed = chance_of_choice((clean + added)[None], added[None], std[None], k)[0]
        for expert in range(5):
            noisy = (clean + added).repeat(draws, 1)
            noisy[:, expert] = clean[expert] + std[expert] * torch.randn(draws, generator=generator)
            frequency = (noisy.topk(k).indices == expert).any(-1).float().mean().item()
            deviation = math.sqrt(frequency * (1 - frequency) / draws)
            assert computed[expert].item() == pytest.approx(frequency, abs=5 * deviation + 1e-4)


def noisy_routing(x: Tensor, weight: Tensor, noise_weight: Tensor, drawn: Tensor, k: int) -> Routing:
    std = torch.nn.functional.softplus(x @ noise_weight.T)
    return routing(x @ weight.T + drawn * std, k, Noise(drawn * std, std))


@pytest.mark.parametrize("term", [switch_loss, z_loss, importance_loss, load_loss])
def test_every_loss_has_the_gradient_of_its_finite_differences(term: Callable[[Routing], Tensor]) -> None:
    """In the router's weight and in the noise's, which is how either learns to spread the load."""
    generator = torch.Generator().manual_seed(0)
    x, weight, noise_weight, drawn = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 6), (5, 6), (5, 6), (20, 5))
    )

    def loss(weight: Tensor, noise_weight: Tensor) -> Tensor:
        return term(noisy_routing(x, weight, noise_weight, drawn, 2))

    inputs = (weight.requires_grad_(), noise_weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-5)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(loss(*inputs), inputs))


class FixedNoise:
    """The chance of a layer whose noise was drawn beforehand."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def router_noise(self, x: Tensor) -> Noise:
        return self.noise

    def jitter(self, x: Tensor) -> Tensor:
        return x

    def drop_update(self, update: Tensor, source: str) -> Tensor:
        return update

    def drop_hidden(self, hidden: Tensor, row_of: Tensor) -> Tensor:
        return hidden

    def within_capacity(self, routing: Routing) -> Routing:
        return routing


def test_load_on_two_levels_is_the_groups_load_times_the_mean_chance_of_those_who_came() -> None:
    torch.manual_seed(0)
    router = Router(8, 6, 2, num_groups=3, groups_per_token=2)
    x, std = torch.randn(30, 8), torch.rand(30, 9) + 0.2
    noise = Noise(std * torch.randn(30, 9), std)
    found = load(router(x, chance=FixedNoise(noise)))

    experts, groups = x @ router.weight.T + noise.added[:, :6], x @ router.group_weight.T + noise.added[:, 6:]
    group_chance = chance_of_choice(groups, noise.added[:, 6:], std[:, 6:], 2)
    for group in range(3):
        of_group = slice(2 * group, 2 * group + 2)
        came = (groups.topk(2).indices == group).any(-1)
        inside = chance_of_choice(experts[came, of_group], noise.added[came, of_group], std[came, of_group], 1)
        torch.testing.assert_close(found[of_group], group_chance[:, group].sum() * inside.mean(0))
