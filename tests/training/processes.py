"""`python -m training` as a process, as a person starts it, alone or under torchrun; and its work without it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import config as configs
from training import corpora
from training.__main__ import main
from training.process import MALLOC
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
VERSE = "The quick brown fox jumps over the lazy dog, and he sleeps on.\n" * 200


def training(*arguments: object, cwd: Path, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    inherited = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "--", "training"]
    command = [sys.executable, *(torchrun if ranks > 1 else ["-m", "training"]), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start(text: Path, run: str, *more: object, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    arguments = ("train", "--preset", "tiny", "--data", text, "--run", run, *more)
    return training(*arguments, cwd=text.parent, ranks=ranks, **environment)


def train(text: Path, run: str, *more: object, ranks: int = 1, **environment: str) -> str:
    process = start(text, run, *more, ranks=ranks, **environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def assert_refused_in_one_line(message: str, *arguments: object, cwd: Path) -> None:
    process = training(*arguments, cwd=cwd)
    output, _ = process.communicate(timeout=60)
    _assert_one_line(message, process.returncode, output)


def assert_refused_here(message: str, *arguments: object, cwd: Path) -> None:
    """The same in this process, for what only comes to light after torch is imported, which takes two seconds."""
    _assert_one_line(message, *said(*arguments, cwd=cwd))


def _assert_one_line(message: str, code: int, output: str) -> None:
    assert code == 1
    assert message in output
    assert len(output.splitlines()) == 1


def said(*arguments: object, cwd: Path) -> tuple[int, str]:
    """The exit code of a command, and all that it writes, in this process: to start another takes longer."""
    with io.StringIO() as output, pytest.MonkeyPatch.context() as patch:
        for name, value in MALLOC.items():  # without which a training starts its process anew: this one
            patch.setenv(name, value)
        with contextlib.chdir(cwd), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main([*map(str, arguments)])
        return code, output.getvalue()


def train_here(text: Path, run: str, *flags: object, preset: str = "tiny", resume: bool = False) -> Path:
    """The last checkpoint of a run, which is trained in this process: to start another takes longer."""
    parser = argparse.ArgumentParser()
    configs.add_flags(parser)
    config = configs.from_preset(preset, configs.flag_values(parser.parse_args([*map(str, flags)])))
    start = Trainer.resume if resume else Trainer
    return start(config, corpora.from_file(text), text.parent / "runs" / run, torch.device("cpu")).train()
