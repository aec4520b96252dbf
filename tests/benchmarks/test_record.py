"""Records say what they are of, are whole, and never take another one's place."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import Trouble, kept, newest, take, write
from model import checkpoint
from tests.checkpoints import tiny_checkpoint
from tests.service.serving import ROOT, wait_until

STARTS_A_SERVER = """
import argparse, sys
from pathlib import Path
from benchmarks.over_http import started
from benchmarks.record import take

def measure(arguments):
    deaf = "trap 'touch told' TERM; sleep 100 & echo $! > pid; wait; wait"
    with started(["sh", "-c", deaf]):
        sys.stdin.read()  # as long as the test is there

take("nothing", argparse.Namespace(results=Path("results")), measure, str)
"""


def test_a_record_says_when_where_of_what_and_by_which_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    arguments = argparse.Namespace(checkpoint=folder, rounds=3, results=tmp_path / "results")
    assert take(
        "nothing", arguments, lambda given: {"figure": given.rounds * 2}, lambda each: f"table {each['figure']}"
    )
    (path,) = (tmp_path / "results").iterdir()
    told = json.loads(path.read_text())
    assert path.stem == "nothing-" + told["date"].removesuffix("+00:00").replace(":", "")
    assert told["manifest"] == checkpoint.verify(folder).fingerprint
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert head.startswith(told["commit"].removesuffix("-dirty")) if head else told["commit"] is None
    assert (told["rounds"], told["figure"]) == (3, 6)
    assert told["machine"]["cores"] >= 1
    assert told["torch"]
    assert capsys.readouterr().out.splitlines()[0] == "table 6"


@pytest.mark.parametrize("error", [Trouble("no\nway"), OSError("no way"), checkpoint.CheckpointError("no way")])
def test_trouble_is_told_in_a_line_and_nothing_is_kept(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(_: argparse.Namespace) -> record.Result:
        raise error

    assert take("nothing", argparse.Namespace(results=tmp_path / "results"), measure, str) is None
    assert capsys.readouterr() == ("", "benchmarks, nothing: no way\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("others", "is_told"), [(0.05, False), (0.25, True), (None, False)])
def test_who_had_busy_neighbours_is_not_to_be_trusted(
    others: float | None, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take("nothing", argparse.Namespace(results=tmp_path), lambda _: {"cores_of_others": others}, lambda _: "")
    assert ("Do not trust this" in capsys.readouterr().out) is is_told
    assert json.loads(newest("nothing", tmp_path).read_text())["machine"]["cores_of_others"] == others


def test_the_newest_is_found_by_its_moment_among_those_of_its_kind(tmp_path: Path) -> None:
    names = ["a-2026-11-26", "a-2026-11-26T090000", "a-2026-11-27", "b-2026-11-28", "ab-2030-01-01"]
    for name in names:
        write(tmp_path / f"{name}.json", "{}")
    assert [path.stem for path in kept("a", tmp_path)] == [names[2], names[1], names[0]]
    assert newest("a", tmp_path).stem == names[2]
    with pytest.raises(Trouble):
        newest("c", tmp_path)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2])
def test_what_is_begun_is_told_to_end_with_us_and_killed_with_all_it_left_behind(
    tmp_path: Path, ending: signal.Signals, times: int
) -> None:
    """The server does not heed SIGTERM, and its child would live on. Who asks twice need not wait."""
    child = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"import benchmarks.over_http as it; it.ENDING_S = {0.2 if times == 1 else 1000}\n{STARTS_A_SERVER}"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stdin=subprocess.PIPE)
    wait_until(lambda: child.exists() and child.read_text().endswith("\n"))
    process.send_signal(ending)
    if times == 2:
        wait_until(lambda: (tmp_path / "told").exists())
        process.send_signal(ending)
    assert process.wait(30) == 128 + ending
    wait_until(lambda: not _lives(int(child.read_text())))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_record_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "nothing-2026-11-26.json"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.glob("*.json")) == [path]
