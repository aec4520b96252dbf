"""The window's arithmetic: what falls into it, when it says nothing, and figures whose values are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model import routing
from model.config import ModelConfig
from service.engine.reports import Figures
from service.expert_window import (
    LEAST_TOKENS,
    LONGEST_S,
    SNAPSHOT_EVERY_S,
    ExpertLoad,
    ExpertWindow,
    Floats,
    divergence,
    entropy_ratio,
)

LAYERS, EXPERTS = 2, 4
CONFIG = ModelConfig(vocab_size=65, num_layers=LAYERS, num_experts=EXPERTS, experts_per_token=1)
EVEN = np.full((LAYERS, EXPERTS), 1 / EXPERTS)


class Engine:
    """Its counts and its clock, which only a test moves. One expert a token, so that a layer's work is its tokens."""

    def __init__(self, baseline: Floats | None = None) -> None:
        self.now = 100.0
        self.tokens = np.zeros((2, LAYERS, EXPERTS), np.int64)
        self.window = ExpertWindow(CONFIG, baseline, clock=lambda: self.now)

    def work(self, *loads: list[int], seconds: float = 0.0, phase: int = 1) -> None:
        """So many tokens for each expert of the first layer, and of the second unless it does the same."""
        self.tokens = self.tokens.copy()
        self.tokens[phase] += np.array(loads if len(loads) > 1 else loads * LAYERS)
        self.now += seconds

    @property
    def figures(self) -> Figures:
        return Figures(
            taken_at=self.now,
            expert_counts=self.tokens,
            gate_weight=self.tokens.sum(axis=0) / 2,
            routed_tokens=self.tokens.sum(axis=-1),
            running=0,
            queued=0,
            prompt_tokens=0,
            generated_tokens=0,
        )

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += SNAPSHOT_EVERY_S
            self.window.keep(self.figures)

    def load(self, seconds: float | None = None) -> ExpertLoad:
        return self.window.load(self.figures, seconds)


def test_a_window_holds_what_came_after_its_beginning_and_nothing_else() -> None:
    engine = Engine()
    engine.work([7, 0, 0, 0], phase=0)
    engine.tick(20)
    engine.work([0, 5, 0, 0])
    engine.tick(4)
    engine.work([0, 0, 3, 0])
    recent, older, all_of_it = engine.load(10), engine.load(4 * SNAPSHOT_EVERY_S), engine.load()
    assert recent.tokens.sum(axis=0).tolist() == [[0, 0, 3, 0]] * LAYERS
    assert older.tokens.sum(axis=0).tolist() == [[0, 5, 3, 0]] * LAYERS
    assert all_of_it.tokens.sum(axis=0).tolist() == [[7, 5, 3, 0]] * LAYERS
    assert all_of_it.tokens[0].tolist() == [[7, 0, 0, 0]] * LAYERS
    assert [load.routed.tolist() for load in (recent, older, all_of_it)] == [[3, 3], [8, 8], [15, 15]]
    assert older.gate_weight.tolist() == [[0, 2.5, 1.5, 0]] * LAYERS
    assert [recent.seconds, older.seconds, all_of_it.seconds] == [10, 20, 24 * SNAPSHOT_EVERY_S]


def test_a_window_is_never_shorter_than_asked_for_and_hardly_longer() -> None:
    engine = Engine()
    engine.tick(3 * LONGEST_S // SNAPSHOT_EVERY_S)
    for asked in (1, 7, 60, 299, 300, LONGEST_S):
        for _ in range(10):
            assert asked <= engine.load(asked).seconds <= asked + SNAPSHOT_EVERY_S
            engine.now += SNAPSHOT_EVERY_S / 10
        engine.window.keep(engine.figures)


def test_a_young_process_has_a_shorter_window() -> None:
    engine = Engine()
    engine.work([1, 2, 3, 4], seconds=12)
    assert engine.load(300).seconds == 12
    assert engine.load(300).routed.tolist() == [10, 10]


def test_the_ring_stays_small() -> None:
    engine = Engine()
    engine.tick(10_000)
    assert len(engine.window._ring) <= LONGEST_S / SNAPSHOT_EVERY_S + 2


def test_idle_time_empties_the_window() -> None:
    engine = Engine()
    engine.work([500] * EXPERTS)
    assert not np.isnan(engine.load(60).entropy_ratio).any()
    engine.tick(20)
    assert engine.load(60).routed.tolist() == [0, 0]
    assert np.isnan(engine.load(60).share).all()
    assert np.isnan(engine.load(60).entropy_ratio).all()
    assert engine.load().routed.tolist() == [2000, 2000], "since the start nothing is forgotten"


def test_before_the_first_figures_nothing_is_known() -> None:
    window = Engine(EVEN).window
    load = window.load(None, 300)
    assert not load.tokens.any()
    for values in (load.share, load.entropy_ratio, load.max_load_ratio, load.jain, load.num_idle, load.drift):
        assert np.isnan(values).all()


def test_old_figures_say_how_old_they_are_and_end_the_counts() -> None:
    engine = Engine()
    engine.work([1, 1, 1, 1], seconds=3)
    old = engine.figures
    engine.now += 40
    assert engine.window.load(old, None).age_s == 40
    assert engine.window.load(old, None).routed.tolist() == [4, 4]


def test_below_the_least_tokens_a_layer_says_nothing_and_its_neighbour_does() -> None:
    engine = Engine(EVEN)
    engine.work([LEAST_TOKENS, 0, 0, 0], [LEAST_TOKENS - 1, 0, 0, 0])
    load = engine.load(60)
    for values in (load.entropy_ratio, load.max_load_ratio, load.jain, load.num_idle, load.drift):
        assert np.isnan(values).tolist() == [False, True]
    assert load.is_idle.tolist() == [[False, True, True, True], [False] * EXPERTS]
    assert load.share.tolist() == [[1, 0, 0, 0]] * LAYERS, "shares are facts, however few"


def test_the_figures_of_known_loads() -> None:
    engine = Engine(EVEN)
    engine.work([1000, 1000, 1000, 1000], [2000, 2000, 0, 0])
    load = engine.load(60)
    assert load.entropy_ratio.tolist() == [1, 0.5]
    assert load.max_load_ratio.tolist() == [1, 2]
    assert load.jain.tolist() == [1, 0.5]
    assert load.num_idle.tolist() == [0, 2]
    assert load.drift[0] == 0
    # By hand: the mean is (3/8, 3/8, 1/8, 1/8), of 1.811278 bits; the two have 1 bit and 2.
    assert load.drift[1] == pytest.approx(1.811278 - 1.5, abs=1e-6)


def test_entropy_and_load_are_those_that_training_reports() -> None:
    counts = torch.randint(1000, (5, 16), generator=torch.Generator().manual_seed(0))
    counts[0] = torch.tensor([9] + [0] * 15)
    share = (counts / counts.sum(-1, keepdim=True)).double().numpy()
    exact = counts.numpy() / counts.numpy().sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy_ratio(exact), routing.load_entropy_ratio(counts), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(share.max(-1) * 16, routing.max_load_ratio(counts), rtol=1e-6)


def test_the_divergence_is_symmetric_and_from_0_to_1() -> None:
    left, right = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.9, 0.1])
    assert divergence(left, right) == pytest.approx(1)
    assert divergence(left, left) == 0
    shares = np.random.default_rng(0).dirichlet(np.ones(8), size=(2, 50))
    forth, back = divergence(*shares), divergence(*shares[::-1])
    np.testing.assert_allclose(forth, back)
    assert (forth > 0).all()
    assert (forth < 1).all()


def test_a_single_expert_is_as_even_as_can_be() -> None:
    assert entropy_ratio(np.ones((3, 1))).tolist() == [1, 1, 1]
    assert divergence(np.ones((3, 1)), np.ones((3, 1))).tolist() == [0, 0, 0]


def test_without_a_baseline_there_is_no_drift_and_all_else() -> None:
    engine = Engine(baseline=None)
    engine.work([1000] * EXPERTS)
    assert np.isnan(engine.load(60).drift).all()
    assert engine.load(60).entropy_ratio.tolist() == [1, 1]
