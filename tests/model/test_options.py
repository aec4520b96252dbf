"""The model's options: activations, two levels of gating, gates over all; and that no model has chance of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import SparseMoE, checkpoint
from model.config import ModelConfig, UnsupportedConfig
from model.router import Router
from tests.checkpoints import tiny_checkpoint, tiny_model

HIERARCHY = {"num_experts": 16, "experts_per_token": 4, "num_groups": 4, "groups_per_token": 2}
OPTIONS: list[dict[str, Any]] = [
    {"activation": "relu"},
    {"activation": "gelu"},
    {"gates_over": "all", "experts_per_token": 1},
    HIERARCHY,
    {**HIERARCHY, "activation": "relu", "gates_over": "all"},
]


def tokens(count: int = 50) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def moe(**options: Any) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(32, **{"num_experts": 4, "experts_per_token": 2, "expert_size": 48, **options})


@pytest.mark.parametrize("options", OPTIONS)
def test_grouped_experts_equal_the_loop_with_all_gradients(options: dict[str, Any]) -> None:
    layer, weighting = moe(**options), torch.randn(50, 32)
    results = []
    for compute in (layer.experts.forward, layer.experts.reference):
        y = compute(tokens(), layer.router(tokens()))
        results.append([y, *torch.autograd.grad((y * weighting).sum(), list(layer.parameters()), allow_unused=True)])
    for fast, readable in zip(*results, strict=True):
        assert (fast is None) == (readable is None)
        if fast is not None:
            torch.testing.assert_close(fast, readable, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates_over": "Chosen"}, "gates_over is 'Chosen'"),
        ({"experts_per_token": 3, "num_groups": 2, "groups_per_token": 2}, "must be a multiple of groups_per_token"),
        ({"expert_size": 18}, "must be a multiple of 16"),
    ],
)
def test_a_layer_of_its_own_refuses_what_a_model_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        moe(**options)


@pytest.mark.parametrize(("activation", "act"), [("relu", F.relu), ("gelu", F.gelu)])
def test_one_plain_expert_is_the_dense_layer(activation: str, act: Any) -> None:
    layer = moe(num_experts=1, experts_per_token=1, activation=activation)
    dense = act(tokens() @ layer.experts.gate_up[0, 0].T) @ layer.experts.down[0].T
    torch.testing.assert_close(layer(tokens())[0], dense)


def test_one_swiglu_expert_is_the_dense_layer() -> None:
    layer = moe(num_experts=1, experts_per_token=1)
    gate, up = layer.experts.gate_up[0]
    dense = (F.silu(tokens() @ gate.T) * (tokens() @ up.T)) @ layer.experts.down[0].T
    torch.testing.assert_close(layer(tokens())[0], dense)


def hierarchy(**options: Any) -> Router:
    torch.manual_seed(0)
    sizes = {"num_experts": 12, "experts_per_token": 4, "num_groups": 3, "groups_per_token": 2}
    return Router(32, **{**sizes, **options})


def test_gates_of_everybody_on_two_levels_are_the_flat_product() -> None:
    router = hierarchy(experts_per_token=12, groups_per_token=3)
    routing, x = router(tokens()), tokens()
    groups = (x @ router.group_weight.T).softmax(-1)
    experts = (x @ router.weight.T).unflatten(-1, (3, 4)).softmax(-1)
    gates = torch.zeros(50, 12).scatter(1, routing.expert_ids, routing.expert_weights)
    product = (groups[..., None] * experts).flatten(1)
    torch.testing.assert_close(gates, product)
    torch.testing.assert_close(routing.logits.softmax(-1), product)


def test_a_token_goes_to_its_best_groups_and_to_the_best_experts_in_each() -> None:
    router = hierarchy()
    routing = router(tokens())
    for x, ids, weights in zip(tokens(), routing.expert_ids, routing.expert_weights, strict=True):
        group_gates, groups = (router.group_weight @ x).topk(2)
        wanted: dict[int, float] = {}
        for gate, group in zip(group_gates.softmax(-1), groups.tolist(), strict=True):
            logits, experts = (router.weight[4 * group : 4 * group + 4] @ x).topk(2)
            inside = zip(logits.softmax(-1), experts.tolist(), strict=True)
            wanted |= {4 * group + expert: (gate * weight).item() for weight, expert in inside}
        assert dict(zip(ids.tolist(), weights.tolist(), strict=True)) == pytest.approx(wanted)
    torch.testing.assert_close(routing.expert_weights.sum(-1), torch.ones(50))


def test_one_expert_per_token_teaches_the_router_only_with_gates_over_all() -> None:
    for gates_over, learns in (("chosen", False), ("all", True)):
        layer = moe(experts_per_token=1, gates_over=gates_over)
        y, routing = layer(tokens())
        y.square().sum().backward()
        assert layer.router.weight.grad is not None
        assert bool(layer.router.weight.grad.abs().max() > 1e-4) is learns
        if learns:
            torch.testing.assert_close(routing.expert_weights[:, 0], routing.logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("gates_over", ["chosen", "all"])
def test_a_group_with_too_few_experts_left_is_passed_over_and_others_are_as_they_were(
    gates_over: str, left: int
) -> None:
    router = hierarchy(gates_over=gates_over)
    disabled = torch.zeros(1, 12, dtype=torch.bool)
    disabled[0, [*range(4 - left), 4]] = True  # of the first group too few are left; three of the second
    routing = router(tokens(), disabled)
    assert set(routing.expert_ids.flatten().tolist()) == {5, 6, 7, 8, 9, 10, 11}
    assert routing.expert_weights.isfinite().all()
    assert (routing.expert_weights > 0).all()
    everybody = router(tokens(), torch.zeros(1, 12, dtype=torch.bool))
    assert torch.equal(everybody.expert_weights, router(tokens()).expert_weights)
    per_token = torch.cat([disabled, torch.zeros(49, 12, dtype=torch.bool)])
    assert torch.equal(router(tokens(), per_token).expert_ids[1:], everybody.expert_ids[1:])


def test_a_silenced_expert_leaves_its_share_to_its_group_and_the_groups_theirs() -> None:
    router = hierarchy(gates_over="all")
    disabled = torch.zeros(1, 12, dtype=torch.bool)
    disabled[0, 0] = True
    routing, x = router(tokens(), disabled), tokens()
    groups = (x @ router.group_weight.T).softmax(-1)
    experts = (x @ router.weight.T).masked_fill(disabled, -torch.inf).unflatten(-1, (3, 4)).softmax(-1)
    product = (groups[..., None] * experts).flatten(1)
    torch.testing.assert_close(routing.logits.softmax(-1), product)
    torch.testing.assert_close(routing.expert_weights, product.gather(-1, routing.expert_ids))


def test_what_may_be_disabled_leaves_enough_groups_that_can_give_their_share() -> None:
    config = tiny_model(**HIERARCHY).config  # 4 groups of 4; a token takes 2 in each of 2
    assert config.can_do_without([0, 1, 2, 4, 5, 6])
    assert config.can_do_without([0, 1, 4, 5, 8, 9, 12, 13])
    assert not config.can_do_without([0, 1, 2, 4, 5, 6, 8, 9, 10])
    assert not config.can_do_without(range(16))
    flat = tiny_model().config
    assert flat.can_do_without([0, 1])
    assert not flat.can_do_without([0, 1, 2])


def test_a_state_that_is_not_finite_stays_in_its_own_row() -> None:
    layer, x = moe(**HIERARCHY), tokens()
    x[3] = torch.nan
    y, routing = layer(x)
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 16)).all()
    assert not y[3].isfinite().any()
    rest = [row for row in range(50) if row != 3]
    torch.testing.assert_close(y[rest], layer(tokens())[0][rest])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_folder_of_any_kind_comes_back_and_counts_its_parameters(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**options)
    loaded = checkpoint.load(tiny_checkpoint(tmp_path / "any", **options))
    assert loaded.config == model.config
    assert loaded.config.to_hf()["model_type"] == "moescope"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16().float()), name
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_a_config_is_refused_by_whoever_does_not_know_its_kind(options: dict[str, Any]) -> None:
    raw = tiny_model(**options).config.to_hf()
    changes: tuple[dict[str, Any], ...] = (
        {"model_type": "qwen3_moe"},
        {"activation": "tanh"},
        {"hidden_act": "tanh"},
        {"num_groups": 3},
        {"gates_over": None},
        {"rope_scaling": {}},
    )
    for change in changes:
        with pytest.raises(UnsupportedConfig):
            ModelConfig.from_hf({**raw, **change})
    plain = tiny_model().config.to_hf()
    assert plain["model_type"] == "qwen3_moe"
    with pytest.raises(UnsupportedConfig, match="activation"):
        ModelConfig.from_hf({**plain, "activation": "swiglu"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_groups": 3},
        {"num_groups": 4, "groups_per_token": 5, "experts_per_token": 5, "num_experts": 8},
        {"groups_per_token": 2, "num_groups": 2, "experts_per_token": 3},
        {"experts_per_token": 6, "groups_per_token": 1, "num_groups": 2},
        {"activation": "tanh"},
        {"gates_over": "none"},
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConfig, match="|".join(wrong)):
        ModelConfig(**{"vocab_size": 65, "num_experts": 8, **wrong})


def test_the_layer_alone_is_one_import_that_importing_the_package_does_not_pay_for() -> None:
    code = "import sys, model; assert 'torch' not in sys.modules; from model import SparseMoE; print(SparseMoE)"
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "SparseMoE" in found.stdout, found.stderr
    y, routing = moe()(torch.randn(2, 5, 32))
    assert y.shape == (2, 5, 32)
    assert 0.05 < y.std() < 2, "fresh weights keep the scale of what they read"
    assert routing.expert_ids.shape == (10, 2)


def test_a_model_that_serves_has_nothing_random_about_it() -> None:
    """Whatever torch's generator is about to say, in training mode too."""
    for options in OPTIONS:
        model = tiny_model(**options).train()
        ids = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        first = model(ids)[0]
        torch.manual_seed(2)
        assert torch.equal(model(ids)[0], first)
