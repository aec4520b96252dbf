"""What a person sees of a run: on a terminal a bar that tells what remains, in a file the evaluations alone."""

from __future__ import annotations

import re

import pytest
import torch

from training.evaluate import Evaluation
from training.journal import StepFigures
from training.progress import Progress

BALANCED = Evaluation(loss=1.5, num_windows=3, counts=torch.full((2, 4), 5))
SAMPLE = "\nTo be\nor not\nto be\nthat is\nthe question\n"


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Of a run that is resumed at the second of its eight steps, stopped after five and looked at once."""
    progress = Progress(num_steps=8, tokens_per_step=100, done=2)
    progress.start()
    for step, loss in ((3, 1.75), (4, 1.5), (5, 1.25)):
        progress.step(step, loss)
    progress.evaluation(StepFigures(5, 1.25, 1.0, 500, 2.5, 200.0), BALANCED, SAMPLE)
    progress.stop()
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)


def test_a_terminal_shows_how_far_a_run_has_come_its_speed_and_what_remains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if the output were a terminal
    monkeypatch.setenv("COLUMNS", "120")
    bar = shown(capsys).splitlines()[-1]
    assert re.search(r" 5/8 loss 1\.2500 [\d,]+ tokens/s 0:00:0\d left 0:00:0\d", bar), bar


def test_a_file_has_the_evaluations_alone_with_the_first_lines_of_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    first, *sample = shown(capsys).strip().splitlines()
    assert first.startswith("step 5: validation loss 1.5000 over 3 windows, busiest expert 1.00 x the mean, 0 idle")
    assert first.endswith("entropy 1.000, 200 tokens/s")
    assert sample == ["  | To be", "  | or not", "  | to be", "  | that is"]
