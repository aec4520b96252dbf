"""The two benchmarks of the experts' figures run and tell numbers that can be. A tiny checkpoint, no times asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.drift import CHUNK, counts_by_chunk, figures
from service.expert_window import LEAST_TOKENS
from tests.checkpoints import tiny_checkpoint, tiny_model
from tests.service.serving import ROOT


def test_the_share_of_counting_is_told_for_both_runners_and_may_not_be_exceeded(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "tiny")
    flags = ["--checkpoint", tiny, "--streams", 1, 3, "--rounds", 1, "--steps", 3, "--threads", 1]
    command = [sys.executable, "-m", "benchmarks.counting", *map(str, flags), "--results", str(tmp_path / "results")]
    run = subprocess.run([*command, "--at-most", "1"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[-1]
    (kept,) = (tmp_path / "results").glob("counting-*.json")
    assert kept.read_text() == line + "\n"
    told = json.loads(line)
    runners = ["torch"] if told["no_native"] else ["native", "torch"]
    assert [(row["runner"], row["streams"]) for row in told["figures"]] == [
        (each, n) for each in runners for n in (1, 3)
    ]
    assert all(0 < row["share"] < 1 for row in told["figures"])
    run = subprocess.run([*command, "--at-most", "0"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == len(told["figures"])


def test_a_text_s_drift_is_of_its_own_counts() -> None:
    model = tiny_model()
    config = model.config
    ids = torch.randint(config.vocab_size, (2 * LEAST_TOKENS + 7,), generator=torch.Generator().manual_seed(0))
    counts = counts_by_chunk(model, ids)
    assert counts.shape == (2 * LEAST_TOKENS // CHUNK, config.num_layers, config.num_experts)
    assert (counts.sum(dim=-1) == CHUNK * config.experts_per_token).all()
    own = (counts.sum(dim=0) / counts.sum(dim=0).sum(dim=-1, keepdim=True)).double().numpy()
    told = figures("its own", counts, 2 * LEAST_TOKENS, own)
    assert told is not None
    assert told["windows"] == 1
    assert told["drift_max"] < 1e-6
    assert figures("its own", counts, 3 * LEAST_TOKENS, own) is None
