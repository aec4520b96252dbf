"""A run that is killed whenever it pleases chance ends with the bytes of the unbroken run."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import torch

from tests.evidence import At, Evidence
from tests.training.processes import start, train
from training import runs

ARGUMENTS = ("--steps", 20, "--evaluate-every", 4)
LAST = "step-20"


def ran_until_killed(text: Path, after_seconds: float) -> bool:
    """Begin the broken run or go on with it, and kill it so long after its first words; False if it ended before."""
    run = text.parent / "runs" / "broken"
    process = start(text, "broken", *ARGUMENTS, *(["--resume"] if any(run.glob("step-*")) else []))
    assert process.stdout
    said = process.stdout.readline()  # the model is made, the first step is next
    time.sleep(after_seconds)
    process.kill()
    rest, _ = process.communicate()
    assert process.returncode in (0, -9), said + rest
    return process.returncode != 0


def assert_same_state(broken: Path, whole: Path) -> int:
    """Weights and optimizer, bit by bit; returns how many tensors they are."""
    resumed, expected = runs.read_state(broken), runs.read_state(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    return len(expected)


def test_killed_at_random_moments_a_run_ends_with_the_bytes_of_the_unbroken_one(
    text: Path, at: At, evidence: Evidence
) -> None:
    train(text, "whole", *ARGUMENTS)
    whole, broken = text.parent / "runs" / "whole" / LAST, text.parent / "runs" / "broken" / LAST
    chance = random.Random(7)
    kills = compared = 0
    while kills < at(2, 30):
        if ran_until_killed(text, chance.uniform(0, 1.5)):
            kills += 1
        if broken.exists():  # it was quicker than we: compare, and break another one
            compared += assert_same_state(broken, whole)
            shutil.rmtree(broken.parent)
    resume = ["--resume"] if any(broken.parent.glob("step-*")) else []
    train(text, "broken", *ARGUMENTS, *resume)
    compared += assert_same_state(broken, whole)
    evidence("kills at random moments", kills)
    evidence("tensors of weights and optimizer that differ from the unbroken run's", f"0 of {compared}")
