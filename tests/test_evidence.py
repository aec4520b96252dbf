"""The suite's own promises: claims grow under --prove and are written down, and --no-skips lets no gap through."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_a_kill_loses_nothing(at, evidence):
    evidence("kills survived", at(20, 2000))

@pytest.mark.parametrize("expert", [0, 1])
def test_no_expert_is_idle(evidence, expert):
    evidence("load", 0.12345678)
    assert expert == 0

def test_plain():
    pass

def test_with_a_browser():
    pytest.skip("no browser")

@pytest.mark.cuda
@pytest.mark.skip("no GPU")
def test_on_a_gpu():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    return tmp_path


def run(suite: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "tests.evidence", "-rs", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_plain_run_is_small_and_tells_why_it_skipped(suite: Path) -> None:
    said = run(suite)
    assert "1 failed, 3 passed, 2 skipped" in said
    assert "no browser" in said


def test_no_skips_fails_on_a_missing_browser_but_not_on_a_missing_gpu(suite: Path) -> None:
    said = run(suite, "--no-skips", "--deselect", "test_suite.py::test_no_expert_is_idle")
    assert "--no-skips: no browser" in said
    assert "1 failed, 2 passed, 1 skipped" in said


def test_a_proof_runs_the_claims_alone_at_full_size_and_writes_what_it_measured(suite: Path) -> None:
    said = run(suite, "-q", "--prove", "--evidence", "page.md")
    assert "a kill loses nothing - kills survived: 2,000" in said
    assert "1 failed, 2 passed, 3 deselected" in said
    rows = [line.split(" | ")[:3] for line in (suite / "page.md").read_text().splitlines() if line.startswith("| ")]
    assert rows == [
        ["| verdict", "claim", "measured"],
        ["| proved", "a kill loses nothing", "kills survived: 2,000"],
        ["| proved", "no expert is idle [0]", "load: 0.123457"],
        ["| FAILED", "no expert is idle [1]", "load: 0.123457"],
    ]
