"""Every preset trains, saves, loads, and streams through the real service; so do thousands of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from model.checkpoint import Checkpoint
from model.generate import generate
from tests.checkpoints import tiny_checkpoint
from tests.service.here import served_here
from tests.service.serving import Service
from tests.training.processes import VERSE, train_here
from training import config as configs

# Less of everything that costs time, and nothing less of what makes a preset what it is.
SMALL = ("--hidden-size", 32, "--num-layers", 2, "--expert-size", 16, "--context-length", 32, "--batch-size", 4)

Serve = Callable[[Path], Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as served:

        def serve(folder: Path) -> Service:
            flags = ("--checkpoint", folder, "--threads", 1, "--slots", 2, "--max-new-tokens", 100)
            return served.enter_context(served_here(*flags))

        yield serve


def assert_streams(server: Service, loaded: Checkpoint) -> None:
    """The service streams the reference's greedy text, and counts every token once for each of its experts."""
    prompt = loaded.tokenizer.fold("The ")
    wanted = generate(loaded.model, loaded.tokenizer.encode(prompt), 20)
    *tokens, (name, done) = server.events(prompt, temperature=0, max_new_tokens=20)
    assert name == "done"
    streamed = "".join(data["text"] for event, data in tokens if event == "token")
    assert streamed == loaded.tokenizer.decode(wanted)
    for layer in done["routing"]["counts"]:
        assert len(layer) == loaded.config.num_experts
        assert sum(layer) == loaded.config.experts_per_token * done["routing"]["tokens"]


@pytest.mark.parametrize("preset", configs.preset_names())
def test_a_preset_trains_saves_loads_and_streams(preset: str, tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "verse.txt").write_text(VERSE)
    flags = (*SMALL, "--steps", 20, "--evaluate-every", 20, "--warmup-steps", 2)
    folder = train_here(tmp_path / "verse.txt", preset, *flags, preset=preset)
    loaded = checkpoint.load(folder)
    assert_streams(serve(folder), loaded)
    config = configs.from_preset(preset, {}).model_config(loaded.config.vocab_size)
    for name in ("num_experts", "experts_per_token", "num_groups", "groups_per_token", "activation", "gates_over"):
        assert getattr(loaded.config, name) == getattr(config, name), "the small model has the preset's features"


def test_a_preset_that_reproduces_another_work_says_where_that_is_published_and_what_stays_ours() -> None:
    for preset in ("makemoe", "shazeer17", "switch", "hierarchical", "outrageous"):
        text = (configs.PRESETS / f"{preset}.toml").read_text()
        assert "arXiv" in text or "https://" in text
        assert "# Ours: " in text


def test_four_thousand_experts_load_and_stream(tmp_path: Path, serve: Serve) -> None:
    sizes: dict[str, Any] = {"num_experts": 4096, "num_groups": 64, "groups_per_token": 2, "experts_per_token": 4}
    folder = tiny_checkpoint(tmp_path / "many", **sizes, num_layers=1, expert_size=16, activation="relu")
    assert_streams(serve(folder), checkpoint.load(folder))


def test_what_a_hierarchical_model_cannot_do_without_is_refused_and_what_it_can_does_no_work(
    tmp_path: Path, serve: Serve
) -> None:
    """3 groups of 4, and a token takes 2 in each of 2: a group with 1 left is passed over, and two must remain."""
    sizes: dict[str, Any] = {"num_experts": 12, "num_groups": 3, "groups_per_token": 2, "experts_per_token": 4}
    server = serve(tiny_checkpoint(tmp_path / "groups", **sizes))
    passed_over = [[0, expert] for expert in (0, 1, 2)]
    counts = server.answer(max_new_tokens=20, disabled_experts=[*passed_over, [0, 4]])["routing"]["counts"]
    assert counts[0][:5] == [0] * 5
    assert all(counts[1])
    refused = server.generate(disabled_experts=[*passed_over, [0, 4], [0, 5], [0, 6]])
    assert refused.status_code == 422
    assert "must leave at least 2 experts in 2 of the 3 groups in every layer" in refused.text
