"""From a folder to a warm engine: which runner it gets, and what is said where that is the slower one."""

from __future__ import annotations

import ctypes
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from service.engine.engine import Engine
from service.engine.loading import EngineOptions, build_engine
from service.engine.native import library
from service.engine.thread import CannotServe, EngineInfo
from tests.checkpoints import tiny_checkpoint


def build(folder: Path, **options: Any) -> tuple[Engine, EngineInfo]:
    wanted = EngineOptions(folder, "cpu", threads=1, slots=2, kv_memory_mib=64, prefill_chunk=16, **options)
    return build_engine(wanted, lambda phase: None)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno == logging.WARNING]


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "BUILT", tmp_path / "built")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_the_native_step_decodes_where_it_can_be_had(
    native_step: ctypes.CDLL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    assert build(folder)[1].runner == "native"
    assert build(folder, runner="torch")[1].runner == "torch"
    assert warnings(caplog) == []


def test_two_builds_of_the_step_have_two_fingerprints(
    native_step: ctypes.CDLL, portable_step: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bits are not the same, so nobody may go on with the other's text."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    prints = []
    for step in (native_step, portable_step, native_step):
        monkeypatch.setattr(library, "load", lambda step=step: step)
        prints.append(build(folder)[1].fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_decodes_and_one_line_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    assert build(folder)[1].runner == "torch"
    (line,) = warnings(caplog)
    assert "torch reads and writes" in line
    assert "no C++ compiler" in line
    with pytest.raises(CannotServe, match="--runner is native, but there is no C"):
        build(folder, runner="native")


def test_a_model_that_it_does_not_know_is_decoded_by_torch_and_one_line_says_why(
    native_step: ctypes.CDLL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "grouped", num_experts=16, num_groups=4)
    assert build(folder)[1].runner == "torch"
    (line,) = warnings(caplog)
    assert "two levels of gating" in line


def test_a_checkpoint_that_is_another_by_now_is_refused(tmp_path: Path) -> None:
    """The process has read its vocabulary; ids of another one would be looked up beyond the table."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    before = checkpoint.verify(folder).fingerprint
    shutil.rmtree(folder)
    tiny_checkpoint(folder, seed=1)
    with pytest.raises(CannotServe, match="has become another checkpoint"):
        build(folder, fingerprint=before)
