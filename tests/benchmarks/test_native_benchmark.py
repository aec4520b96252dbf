"""The benchmark of the native step runs and tells numbers that can be. A tiny checkpoint, no times asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.native import active_bytes, operations
from service.engine.native import library
from service.engine.native.library import NoLibrary
from tests.checkpoints import tiny_checkpoint, tiny_model
from tests.service.serving import ROOT


def test_every_part_of_a_step_has_its_share_and_prompts_are_read_by_both(tmp_path: Path) -> None:
    try:
        library.load()
    except NoLibrary as missing:
        pytest.skip(f"no native step: {missing} (Debian: apt install g++)")
    tiny = tiny_checkpoint(tmp_path / "tiny")
    flags = ["--checkpoint", tiny, "--rows", 1, 3, "--rounds", 1, "--position", 40, "--prompts", 50, "--threads", 1]
    command = [sys.executable, "-m", "benchmarks.native", *map(str, flags), "--results", str(tmp_path / "results")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[-1]
    (kept,) = (tmp_path / "results").glob("native-*.json")
    assert kept.read_text() == line + "\n"
    told = json.loads(line)
    assert [step["rows"] for step in told["steps"]] == [1, 3]
    for step in told["steps"]:
        assert sum(step["parts"].values()) == pytest.approx(1, abs=0.01)
        assert all(step["parts"][part] > 0 for part in ("QKV", "attention", "router", "counting", "experts", "head"))
    (prompt,) = told["prompts"]
    assert prompt["native"] > 0
    assert prompt["torch"] > 0


def test_bytes_and_operations_are_those_of_the_weights_that_one_row_touches() -> None:
    model = tiny_model()
    config = model.config
    layer = model.layers[0]
    attention = sum(weight.numel() for name, weight in layer.attention.named_parameters() if "norm" not in name)
    experts = layer.moe.experts
    active = (experts.gate_up.numel() + experts.down.numel()) * config.experts_per_token // config.num_experts
    weights = config.num_layers * (attention + layer.moe.router.weight.numel() + active) + model.head.weight.numel()
    assert active_bytes(config, 10**6) - 2 * weights == 2 * 4 * config.num_layers * config.context_length * (
        config.num_kv_heads * config.head_dim
    )
    assert operations(config, 0) - 2 * weights == 2 * 2 * config.num_layers * config.num_heads * config.head_dim
