"""The training benchmark: its back ends compute one function, its count of products is right, its figures are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from model.config import ModelConfig
from tests.service.serving import ROOT
from training.optimizer import is_matrix

CONFIG = ModelConfig(20, 32, 2, 2, 1, 32, num_experts=4, experts_per_token=2, expert_size=48, context_length=16)


def test_every_back_end_computes_the_same_gradients() -> None:
    subject = training.Subject(CONFIG, batch_size=3)
    gradients = {}
    for name in training.BACK_ENDS:
        subject.forward_backward(name)
        gradients[name] = [parameter.grad for parameter in subject.model.parameters()]
    for name in ("sorted_slices", "loop"):
        torch.testing.assert_close(gradients[name], gradients["grouped_mm"], atol=1e-5, rtol=1e-4)


def test_a_dense_model_routes_and_sorts_nothing_and_its_matrices_are_trained_as_ours() -> None:
    dense = training.Subject(replace(CONFIG, num_experts=1, experts_per_token=1, expert_size=96), batch_size=3)
    sparse = training.Subject(CONFIG, batch_size=3)
    assert not [name for name, _ in dense.model.named_parameters() if "router" in name]
    names = [{name for name, _ in subject.model.named_parameters() if is_matrix(name)} for subject in (dense, sparse)]
    assert names[0] == names[1]
    per_token = 2 * CONFIG.num_layers * 3 * CONFIG.hidden_size * 96
    router = 2 * CONFIG.num_layers * CONFIG.hidden_size * CONFIG.num_experts
    with FlopCounterMode(display=False) as counter:
        dense.forward_backward()
    of_dense = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        sparse.forward_backward("loop")
    assert counter.get_total_flops() - of_dense == 3 * 3 * 16 * router, "as many multiplications, but for the router's"
    assert of_dense > 3 * 3 * 16 * per_token


def test_the_products_of_a_step_are_those_that_pytorch_counts() -> None:
    dense = replace(CONFIG, num_experts=1, experts_per_token=1)
    subject = training.Subject(dense, batch_size=3)
    with FlopCounterMode(display=False) as counter:
        subject.forward_backward("loop")
        subject.update()
    # So short a text is one block, which multiplies the whole square; ours counts the half that is seen.
    attention = 3 * 2 * 48 * 2 * 2 * 32 * 16
    assert counter.get_total_flops() == subject.flops + attention


def test_ratios_are_of_one_round_and_the_step_has_its_optimizer() -> None:
    seconds = {"gemm": [1.0, 10.0], "grouped_mm": [2.0, 20.0], "optimizer": [1.0, 10.0], "dense_optimizer": [1.0, 1.0]}
    seconds |= {"sorted_slices": [3.0, 30.0], "loop": [4.0, 40.0], "dense": [1.0, 10.0]}
    figures = training.figures(seconds, tokens=33, flops=600, gemm_flops=400)
    assert figures["over_dense"] == {"grouped_mm": 2, "sorted_slices": 3, "loop": 4}
    assert figures["gemm_peak_share"] == 0.5
    assert figures["optimizer_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["characters_per_second"] == 2
    assert figures["step_ms"] == 16_500


def test_it_keeps_the_line_it_prints(tmp_path: Path) -> None:
    flags = ("--preset", "tiny", "--threads", 1, "--rounds", 1, "--experts", 4, 16, "--gemm", 64, "--results", tmp_path)
    command = [sys.executable, "-m", "benchmarks.training", *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (kept,) = tmp_path.glob("training-*.json")
    line = run.stdout.splitlines()[-1]
    assert kept.read_text() == line + "\n"
    result = json.loads(line)
    assert result["tokens_per_step"] == 8 * 32
    assert result["forward_backward_ms"].keys() == {"grouped_mm", "sorted_slices", "loop", "dense"}
    assert result["step_ms_by_experts"].keys() == {"4", "16"}
    assert result["characters_per_second"] > 0
    assert result["gemm_peak_share"] > 0  # of so small a product it is any number
