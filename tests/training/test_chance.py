"""What is random in training: a function of (seed, step, layer, purpose, place), right on average, absent otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes

from model import checkpoint
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.checkpoints import tiny_model
from training import config as configs
from training import corpora, runs
from training.chance import ChanceOfLayer, chance_in, has_room_for, noise_weights
from training.config import TrainingConfig
from training.objective import objective
from training.trainer import Trainer

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "dropout": 0.2,
    "expert_dropout": 0.3,
    "router_noise": "gaussian",
    "load_weight": 0.1,
    "importance_weight": 0.1,
    "capacity_factor": 1.25,
}


def at(layer: int = 0, step: int = 0, tokens: int = 1000, first_row: int = 0, **options: Any) -> ChanceOfLayer:
    config = TrainingConfig(**options)
    noise = noise_weights(config, tiny_model().config, CPU)
    chance = chance_in(config, noise, step, torch.zeros(tokens // 10, 10), first_row)
    assert chance is not None
    return chance.layer(layer)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    kept = at(dropout=0.25).drop_update(torch.ones(100, 10, 64), "moe")
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])


def test_jitter_is_uniform_around_one() -> None:
    chance = at(router_noise="jitter", jitter=0.1)
    factors = chance.jitter(torch.ones(1000, 64))
    assert 0.9 <= factors.min() < 0.901
    assert 1.099 < factors.max() <= 1.1
    assert factors.var().item() == pytest.approx(0.2**2 / 12, rel=0.02)


def test_noise_is_normal_with_the_learned_deviation() -> None:
    chance = at(router_noise="gaussian")
    weight = chance.of.noise["layers.0.moe.router.noise"]
    assert (chance.router_noise(torch.ones(1000, 32)).std == torch.log(torch.tensor(2.0))).all()  # type: ignore[union-attr]
    with torch.no_grad():
        weight[1] = 0.1
    noise = chance.router_noise(torch.ones(1000, 32))
    assert noise is not None
    assert noise.std[0, 1].item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(3.2)).item())
    standard = noise.added / noise.std
    assert standard.std().item() == pytest.approx(1, abs=0.05)
    assert standard.mean().item() == pytest.approx(0, abs=0.05)


def test_numbers_differ_by_seed_step_layer_and_purpose_and_by_nothing_else() -> None:
    ones = torch.ones(100, 10, 8)
    first = at(dropout=0.5).drop_update(ones, "moe")
    torch.manual_seed(7)
    assert torch.equal(at(dropout=0.5).drop_update(ones, "moe"), first)
    for other in (at(layer=1, dropout=0.5), at(step=1, dropout=0.5), at(dropout=0.5, seed=2)):
        assert 0.45 < (other.drop_update(ones, "moe") == first).float().mean() < 0.55
    assert not torch.equal(at(dropout=0.5).drop_update(ones, "attention"), first)
    second_half = at(tokens=500, first_row=50, dropout=0.5).drop_update(ones[50:], "moe")
    assert torch.equal(second_half, first[50:]), "who has which rows of the batch does not matter"


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"expert_dropout": 0.3},
        {"router_noise": "gaussian"},
        {"router_noise": "jitter", "jitter": 0.3},
        {"capacity_factor": 0.5},
    ],
    ids=lambda options: next(iter(options.values())) if "router_noise" in options else next(iter(options)),
)
def test_each_kind_of_chance_alone_reaches_the_model(options: dict[str, Any]) -> None:
    config, model = TrainingConfig(**options), tiny_model()
    noise = noise_weights(config, model.config, CPU)
    ids = torch.randint(65, (6, 16), generator=torch.Generator().manual_seed(0))
    assert (model(ids, chance=chance_in(config, noise, 3, ids))[0] - model(ids)[0]).abs().max() > 0.1


def test_jitter_is_the_routers_alone() -> None:
    moe, x = tiny_model().layers[0].moe, torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    y, routing = moe(x, chance=at(router_noise="jitter", jitter=0.3, tokens=20))
    assert not torch.equal(routing.logits, moe(x)[1].logits)
    torch.testing.assert_close(y, moe.experts.reference(x, routing))  # what the experts read has none


def test_expert_dropout_is_between_an_experts_matrices() -> None:
    moe, x = tiny_model().layers[0].moe, torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    chance = at(expert_dropout=0.5, tokens=20)
    y, routing = moe(x, chance=chance)
    kept = chance.drop_hidden(torch.ones(40, 32), torch.arange(40)).view(20, 2, 32)  # of each token and choice
    assert kept.unique().tolist() == [0, 2]
    assert (kept == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    by_hand = torch.zeros(20, 32)
    for token, (chosen, weights) in enumerate(zip(routing.expert_ids, routing.expert_weights, strict=True)):
        for choice, (expert, weight) in enumerate(zip(chosen, weights, strict=True)):
            gate, up = moe.experts.gate_up[expert]
            hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token]) * kept[token, choice]
            by_hand[token] += weight * (moe.experts.down[expert] @ hidden)
    torch.testing.assert_close(y, by_hand)


@pytest.mark.parametrize("options", [EVERYTHING, {"router_noise": "jitter", "jitter": 0.1, "expert_dropout": 0.5}])
def test_half_a_batch_is_computed_as_in_the_whole(options: dict[str, Any]) -> None:
    """Through the whole model, so that expert dropout follows its tokens through the sorted layout."""
    config, model = TrainingConfig(**options), tiny_model(num_groups=2, groups_per_token=2)
    noise = noise_weights(config, model.config, CPU)
    ids = torch.randint(65, (6, 16), generator=torch.Generator().manual_seed(0))
    whole, _ = model(ids, chance=chance_in(config, noise, 3, ids))
    half, _ = model(ids[4:], chance=chance_in(config, noise, 3, ids[4:], first_row=4))
    torch.testing.assert_close(half, whole[4:])
    assert (whole - model(ids)[0]).abs().max() > 0.1


def test_without_any_of_it_there_is_no_chance() -> None:
    assert chance_in(TrainingConfig(), {}, 0, torch.zeros(2, 3)) is None


def test_capacity_drops_nothing_at_perfect_balance_and_the_latest_otherwise() -> None:
    balanced = torch.arange(4).repeat(6)[:, None]  # three sequences of 8 tokens, two for each of 4 experts
    assert has_room_for(balanced, 4, length=8, factor=1.0).all()
    crowded = torch.tensor([0, 0, 0, 1, 0, 2, 3, 0, 0, 1, 0, 0, 2, 2, 2, 3])[:, None]
    room = has_room_for(crowded, 4, length=8, factor=1.0)[:, 0]  # two of a sequence for each
    assert (~room).nonzero()[:, 0].tolist() == [2, 4, 7, 11, 14]
    both = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]])  # of a token's two choices either may be dropped
    assert has_room_for(both, 4, length=4, factor=1.0).tolist() == [[True, True]] * 2 + [[False, False], [True, False]]


def test_capacity_is_never_zero_and_rounds_up() -> None:
    assert has_room_for(torch.tensor([[3], [9]]), 1024, length=2, factor=1e-3).all()
    nobody_else = torch.zeros(100, 1, dtype=torch.int64)
    assert has_room_for(nobody_else[:4], 3, length=4, factor=1.0).sum() == 2
    assert has_room_for(nobody_else, 10, length=100, factor=1.1).sum() == 11  # 1.1 x 100 / 10 is above it in floats
    assert has_room_for(nobody_else, 10, length=100, factor=9e18).all()


def test_a_dropped_token_passes_by_its_expert_and_the_routing_says_what_was_wanted() -> None:
    model = tiny_model(experts_per_token=1)
    chance = chance_in(TrainingConfig(capacity_factor=0.01), {}, 0, torch.zeros(1, 20))
    assert chance is not None
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    y, routing = model.layers[0].moe(x, chance=chance.layer(0))
    usual, wanted = model.layers[0].moe(x)
    first = torch.tensor(
        [bool((wanted.expert_ids[:place] != chosen).all()) for place, chosen in enumerate(wanted.expert_ids)]
    )
    torch.testing.assert_close(y[0, first], usual[0, first])
    assert not y[0, ~first].any()
    assert torch.equal(routing.expert_weights, wanted.expert_weights)


def test_noise_weights_learn_are_resumed_exactly_and_are_never_served(text: Path) -> None:
    config = configs.from_preset("tiny", {**EVERYTHING, "steps": 6, "evaluate_every": 3})
    corpus = corpora.from_file(text)

    whole = Trainer(config, corpus, text.parent / "whole", CPU)
    whole.train()
    folder = text.parent / "whole" / "step-3"
    shutil.copytree(folder, text.parent / "broken" / "step-3")
    resumed = Trainer.resume(config, corpus, text.parent / "broken", CPU)
    resumed.train()
    assert whole.noise
    for name, weight in whole.noise.items():
        assert weight.any()
        assert torch.equal(weight, resumed.noise[name]), name
    _assert_equal(whole.model, resumed.model)
    assert any("noise" in name for name in runs.read_state(folder))
    assert not any("noise" in name for name in from_bytes((folder / checkpoint.WEIGHTS).read_bytes()))


def _assert_equal(first: Transformer, second: Transformer) -> None:
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"expert_dropout": float("nan")}, "expert_dropout is nan"),
        ({"router_noise": "loud"}, "none, gaussian, jitter"),
        ({"jitter": -0.1}, "jitter is -0.1"),
        ({"capacity_factor": -1.0}, "capacity_factor is -1"),
        ({"load_weight": 0.1}, "router_noise gaussian"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"experts_per_token": 1}, "experts_per_token is 1, so a router chooses one of 4"),
        ({"num_groups": 2}, "groups_per_token is 1, so a router chooses one of 2"),
        (
            {"num_groups": 2, "groups_per_token": 2},
            "one in each of 2 groups, so a router chooses one of 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_early(values: dict[str, Any], message: str) -> None:
    with pytest.raises(configs.BadConfig, match=message):
        configs.from_preset("tiny", values)


@pytest.mark.parametrize(
    "values",
    [
        {"experts_per_token": 1, "gates_over": "all"},
        {"num_groups": 2, "gates_over": "all"},
        {"num_groups": 2, "groups_per_token": 2, "gates_over": "all"},
        {"num_experts": 8, "experts_per_token": 4, "num_groups": 4, "groups_per_token": 2, "gates_over": "all"},
        {"num_experts": 12, "experts_per_token": 4, "num_groups": 3, "groups_per_token": 2},
    ],
)
def test_every_router_that_is_not_refused_learns_from_the_text(values: dict[str, Any], corpus: corpora.Corpus) -> None:
    config = configs.from_preset("tiny", {**values, "balance_weight": 0.0, "z_weight": 0.0, "init": "kaiming"})
    model = Transformer(config.model_config(65))
    ids = torch.tensor(Tokenizer.of_characters(corpus.train + corpus.validation).encode(corpus.train[:513]))
    logits, routings = model(ids[None, :-1])
    objective(logits, ids[None, 1:], routings, config)[0].backward()
    routers = [weight.grad for name, weight in model.named_parameters() if ".router." in name]
    assert len(routers) == 2 * (1 + ("num_groups" in values))
    assert all(gradient is not None and gradient.any() for gradient in routers)
