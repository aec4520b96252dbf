"""The fast grouped experts compute what the readable loop computes, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.experts import ROW_MULTIPLE, Experts, SparseMoE, padded_layout
from model.router import Router, Routing
from tests.checkpoints import tiny_model


def layer(num_experts: int = 8, experts_per_token: int = 2) -> tuple[Router, Experts]:
    torch.manual_seed(0)
    router, experts = Router(32, num_experts, experts_per_token), Experts(32, num_experts, 48)
    for parameter in [*router.parameters(), *experts.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    return router, experts


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 50])
@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(8, 2), (4, 1), (3, 3), (1, 1)])
def test_grouped_experts_equal_the_loop_with_all_gradients(
    num_tokens: int, num_experts: int, experts_per_token: int
) -> None:
    router, experts = layer(num_experts, experts_per_token)
    tokens = torch.randn(num_tokens, 32)
    weighting = torch.randn(num_tokens, 32)  # so that no two output elements pull alike

    def run(compute: Callable[[Tensor, Routing], Tensor]) -> list[Tensor]:
        x = tokens.clone().requires_grad_()
        y = compute(x, router(x))
        parameters = [x, *router.parameters(), *experts.parameters()]
        return [y, *torch.autograd.grad((y * weighting).sum(), parameters)]

    for fast, readable in zip(run(experts.forward), run(experts.reference), strict=True):
        torch.testing.assert_close(fast, readable, atol=1e-5, rtol=1e-5)


def test_a_token_gets_the_same_bits_alone_and_in_any_crowd() -> None:
    router, experts = layer()
    tokens = torch.randn(64, 32)
    with torch.inference_mode():
        crowd = experts(tokens, router(tokens))
        for size in (4, 8, 20):
            few = tokens[:size]
            assert torch.equal(experts(few, router(few)), crowd[:size])


def test_the_layout_keeps_every_group_on_its_own_rows() -> None:
    expert_ids = torch.tensor([2, 0, 2, 2, 2, 2, 0])
    rows, ends, num_rows = padded_layout(expert_ids, num_experts=3)
    assert len(set(rows.tolist())) == len(expert_ids)
    begins = [0, *ends.tolist()]
    for row, expert in zip(rows.tolist(), expert_ids.tolist(), strict=True):
        assert begins[expert] <= row < begins[expert + 1]
    assert all(end % ROW_MULTIPLE == 0 for end in ends.tolist())
    assert ends[-1] == num_rows, "a row of no group would carry undefined gradients"


def test_weights_sum_to_one_and_follow_the_largest_logits() -> None:
    router, _ = layer()
    routing = router(torch.randn(100, 32))
    assert torch.equal(routing.expert_ids, routing.logits.argsort(descending=True)[:, :2])
    torch.testing.assert_close(routing.expert_weights.sum(-1), torch.ones(100))


def test_a_model_s_gradient_can_be_taken_by_torch_func() -> None:
    model = tiny_model()
    ids = torch.arange(32).view(2, 16)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    taken = torch.func.grad(lambda values: torch.func.functional_call(model, values, ids)[0].square().mean())(
        parameters
    )
    model(ids)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(taken[name], parameter.grad)


def test_one_token_alone_and_many_in_any_shape_get_the_same() -> None:
    moe = SparseMoE(32, 4, 2, 48)
    x = torch.randn(6, 32)
    together, _ = moe(x)
    assert torch.equal(moe(x.view(2, 3, 32))[0], together.view(2, 3, 32))
    y, routing = moe(x[4])
    torch.testing.assert_close(y, together[4])
    assert routing.expert_ids.shape == (1, 2)
