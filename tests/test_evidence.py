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
    assert rows_of(suite) == [
        ["| verdict", "claim", "measured"],
        ["| proved", "a kill loses nothing", "kills survived: 2,000"],
        ["| proved", "no expert is idle [0]", "load: 0.123457"],
        ["| FAILED", "no expert is idle [1]", "load: 0.123457"],
    ]


def test_a_proof_of_a_part_renews_its_own_lines_and_a_whole_one_drops_what_nobody_claims(suite: Path) -> None:
    run(suite, "--prove", "--evidence", "page.md")
    (suite / "test_suite.py").write_text(SUITE.replace("2000", "3000").replace("0.12345678", "0.5"))
    run(suite, "--prove", "--evidence", "page.md", "-k", "kill")
    assert [row[2] for row in rows_of(suite)[1:]] == ["kills survived: 3,000", "load: 0.123457", "load: 0.123457"]
    (suite / "test_suite.py").write_text(SUITE.replace("a_kill_loses_nothing", "no_kill_loses_anything"))
    run(suite, "--prove", "--evidence", "page.md", "-k", "kill")
    assert len(rows_of(suite)) == 5
    run(suite, "--prove", "--evidence", "page.md")
    claims = ["no kill loses anything", "no expert is idle [0]", "no expert is idle [1]"]
    assert [row[1] for row in rows_of(suite)[1:]] == claims


def test_a_proof_that_is_broken_off_has_written_what_it_had(suite: Path) -> None:
    (suite / "test_suite.py").write_text(SUITE + "\ndef test_the_end(evidence):\n    import os; os._exit(1)\n")
    run(suite, "--prove", "--evidence", "page.md")
    assert len(rows_of(suite)) == 4


def rows_of(suite: Path) -> list[list[str]]:
    lines = (suite / "page.md").read_text().splitlines()
    return [line.split(" | ")[:3] for line in lines if line.startswith("| ")]
