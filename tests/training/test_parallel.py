"""Ranks under torchrun train the model that one process trains, and end together. Real processes, gloo on loopback."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import checkpoint
from tests.evidence import Evidence
from tests.training.processes import ROOT, assert_refused_here, start, train, train_here
from training import config as configs
from training import runs

# Another order of summation changes a loss by a bit; a token that goes to another expert for it, or a large step along
# a direction that is all rounding, makes 1e-3 of it within 100 steps. With every expert chosen and small steps neither
# happens, and what is left is what is asked here. Who is chosen is asked below, where ten steps are enough.
GENTLE = ("--matrix-learning-rate", 0.001, "--embedding-learning-rate", 0.0004, "--head-learning-rate", 0.001)
ALL_CHOSEN = ("--experts-per-token", 4, "--importance-weight", 0.1)
FOR_EVER = ("--steps", 100_000, "--evaluate-every", 100_000)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words of chance: gradients of text that repeats itself vanish, and Muon makes full steps of their rounding."""
    chance = random.Random(3)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(1, 8))) for _ in range(300)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(chance.choices(words, k=4000)))
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def wait_for_a_step(run: Path, process: subprocess.Popen[str]) -> None:
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.01)  # polling another process's folder
        assert process.poll() is None


def pid_of_rank(torchrun: subprocess.Popen[str], rank: int) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def test_two_ranks_give_the_loss_of_one_and_one_resumes_what_two_began(text: Path, evidence: Evidence) -> None:
    arguments = ("--steps", 100, "--evaluate-every", 50, *GENTLE, *ALL_CHOSEN)
    train_here(text, "one", *arguments)
    output = train(text, "two", *arguments, ranks=2)
    assert output.count("serve it") == 1
    one, two = losses(text.parent / "runs" / "one"), losses(text.parent / "runs" / "two")
    assert len(one) == len(two) == 100
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    evidence("largest difference of the loss in 100 steps, nats per token", apart)
    assert apart < 1e-4
    shutil.rmtree(text.parent / "runs" / "two" / "step-100")
    train_here(text, "two", *arguments, resume=True)
    assert losses(text.parent / "runs" / "two") == pytest.approx(one, abs=1e-4)


CHANCE = (
    *("--router-noise", "gaussian", "--load-weight", 1, "--importance-weight", 1),
    *("--dropout", 0.1, "--expert-dropout", 0.1, "--capacity-factor", 1.25, "--num-groups", 2, "--gates-over", "all"),
)


# Three layers have matrices that two ranks cannot share evenly.
@pytest.mark.parametrize("options", [("--balance-weight", 3, "--num-layers", 3), CHANCE], ids=["switch", "chance"])
def test_balance_and_chance_are_those_of_the_global_batch(text: Path, options: tuple[object, ...]) -> None:
    """By weights that make statistics of half a batch show within a few steps."""
    arguments = ("--steps", 10, *options)
    train_here(text, "one", *arguments)
    train(text, "two", *arguments, ranks=2)
    assert losses(text.parent / "runs" / "two") == pytest.approx(losses(text.parent / "runs" / "one"), abs=3e-5)


def test_a_signal_ends_all_ranks_in_the_same_step(text: Path) -> None:
    process = start(text, "stop", *FOR_EVER, ranks=2)
    wait_for_a_step(text.parent / "runs" / "stop", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert output.count("stopped at step") == 1
    assert "another rank is gone" not in output
    folder = runs.newest(text.parent / "runs" / "stop")
    assert checkpoint.read_record(folder)["steps"] == len(losses(text.parent / "runs" / "stop"))


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_the_others_with_one_line(text: Path, victim: int) -> None:
    process = start(text, "dies", *FOR_EVER, ranks=2)
    wait_for_a_step(text.parent / "runs" / "dies", process)
    os.kill(pid_of_rank(process, victim), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("another rank is gone")]
    assert len(said) == 1
    assert "--resume" in said[0]


def test_ranks_that_diverge_say_so_once(text: Path) -> None:
    process = start(text, "wild", "--embedding-learning-rate", 1e18, ranks=2)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert output.count("lower the learning rates") == 1
    assert "another rank is gone" not in output


def test_a_text_that_is_not_there_is_told_once_and_by_no_other_words(text: Path) -> None:
    process = start(text.with_name("absent.txt"), "none", ranks=2)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert output.count("cannot be read") == 1
    assert "another rank is gone" not in output
    assert "Error: " not in output.split("torch.distributed")[0]


def test_ranks_whose_run_another_process_trains_say_so_once(text: Path) -> None:
    with runs.claim(text.parent / "runs" / "taken", seen=[]):
        process = start(text, "taken", ranks=2)
        output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert output.count("is being trained by another process") == 1
    assert "another rank is gone" not in output


def test_a_batch_that_the_ranks_cannot_share_is_refused_by_the_first_alone(text: Path) -> None:
    """Before any rank meets another: here there is none to meet."""
    said = []
    for rank in "01":
        process = start(text, "odd", RANK=rank, WORLD_SIZE="3", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="3")
        said.append(process.communicate(timeout=60)[0])
        assert process.returncode == 1
    assert said == ["batch_size is 8; 3 ranks must share it evenly\n", ""]


SKYPILOT: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "skypilot" / "train.yaml").read_text())


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a cable: their names, which are those of the cable's ends too, and addresses."""
    names = [f"ms{secrets.token_hex(4)}{end}" for end in "ab"]  # a cable's end has room for fifteen letters
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", names[0]).returncode:
        pytest.skip("no network namespaces for this user, or no ip (Debian: apt install iproute2, as root)")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        addresses = [f"10.213.77.{number}" for number in (1, 2)]
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


def ip(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *arguments], capture_output=True)


def test_two_machines_train_the_model_of_one_by_the_lines_of_the_file_for_skypilot(
    text: Path, machines: list[tuple[str, str]]
) -> None:
    assert int(SKYPILOT["num_nodes"]) == len(machines)
    arguments = ("--steps", 20, "--evaluate-every", 20, *GENTLE, *ALL_CHOSEN)
    train_here(text, "one", *arguments)
    more = shlex.join(map(str, ("--preset", "tiny", "--data", text, "--run", "two", *arguments)))
    lines = SKYPILOT["run"].replace(".venv/bin/torchrun", f"{sys.executable} -m torch.distributed.run")
    lines, replaced = re.subn("--preset shakespeare", more.replace("\\", r"\\"), lines)
    assert replaced == 1
    processes = []
    for rank, (name, _) in enumerate(machines):
        told = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_NODE_IPS": "\n".join(address for _, address in machines),
            "GLOO_SOCKET_IFNAME": name,  # gloo would ask for the address of this machine's own name
            "PYTHONPATH": str(ROOT),
        }
        command = ["ip", "netns", "exec", name, "bash", "-c", lines]
        processes.append(
            subprocess.Popen(
                command,
                cwd=text.parent,
                env=os.environ | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output.count("serve it") for output in outputs] == [1, 0]
    one, two = losses(text.parent / "runs" / "one"), losses(text.parent / "runs" / "two")
    assert two == pytest.approx(one, abs=1e-4)


def test_the_lines_of_the_page_are_those_of_the_file_for_skypilot() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    found = re.findall(r"^\S*torchrun .*\\\n.*$", page, re.MULTILINE)
    lines = [shlex.split(each.replace("\\\n", " ")) for each in found]
    assert [line[line.index("--node-rank") + 1] for line in lines] == ["0", "1"]
    told = shlex.split(SKYPILOT["run"].replace("\\\n", " "))
    for line in lines:
        assert line[0] in told
        assert sorted(word for word in line if word.startswith("-")) == sorted(word for word in told if word[0] == "-")
        assert line[line.index("--") :] == told[told.index("--") :]
        num_ranks = len(lines) * int(line[line.index("--nproc-per-node") + 1])
        preset = configs.from_preset(line[line.index("--preset") + 1], {})
        assert preset.batch_size % num_ranks == 0


def test_an_environment_that_tells_of_ranks_as_torchrun_does_not_is_refused_in_one_line(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other launchers set LOCAL_RANK too."""
    train = ("train", "--preset", "tiny", "--data", text)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert_refused_here("'RANK=, WORLD_SIZE=, LOCAL_RANK=0, LOCAL_WORLD_SIZE='", *train, cwd=text.parent)
    assert_refused_here("none is no folder", "evaluate", "--checkpoint", "none", cwd=text.parent)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert_refused_here("the 2 ranks cannot meet", *train, cwd=text.parent)
