"""What a run wrote down can be read later, with every step once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.training.processes import train, train_here


def test_tensorboard_shows_every_step_of_a_resumed_run_once(text: Path) -> None:
    train_here(text, "board")
    run = text.parent / "runs" / "board"
    shutil.rmtree(run / "step-20")
    train_here(text, "board", resume=True)
    # As TensorBoard's own server reads: scalars are tensors to it.
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "learning_rate_factor", "tokens_per_second"):
        assert [event.step for event in board.Tensors(f"train/{name}")] == list(range(1, 21))
    for name in ("validation/loss", "layer_max_load/layer_1", "layer_entropy/layer_0"):
        assert [event.step for event in board.Tensors(name)] == [10, 20]
    assert [event.step for event in board.Tensors("sample/text_summary")] == [10, 20]


def test_the_lines_of_a_run_say_how_far_it_had_come(text: Path) -> None:
    train_here(text, "lines")
    lines = [json.loads(line) for line in (text.parent / "runs" / "lines" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in steps] == [8 * 32 * step for step in range(1, 21)]
    factors = [line["learning_rate_factor"] for line in steps]
    assert factors[:3] == [0.5, 1, 1]
    assert factors[-1] == pytest.approx(1 / 12, abs=1e-6), "of the last twelve steps, over which they fall"
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    last = lines[-1]
    assert len(last["layer_max_load"]) == len(last["layer_entropy"]) == 2
    assert max(last["layer_max_load"]) == last["max_load"]


def test_without_tensorboard_a_run_says_so_in_one_line_and_goes_on(text: Path) -> None:
    """A package that cannot be imported stands for one that is not there."""
    hidden = text.parent / "hidden"
    hidden.mkdir()
    (hidden / "tensorboard.py").write_text("raise ModuleNotFoundError('tensorboard')\n")
    root = Path(__file__).parents[2]
    output = train(text, "plain", PYTHONPATH=f"{hidden}:{root}")
    said = [line for line in output.splitlines() if "tensorboard" in line]
    assert said == ["tensorboard is not installed; runs/plain/metrics.jsonl has the same numbers"]
    assert not (text.parent / "runs" / "plain" / "tensorboard").exists()
