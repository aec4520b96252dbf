"""The comparison of recipes: runs are trained once, go on where they were, and the page shows what records say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import Row
from tests.service.serving import ROOT, wait_until

ENDLESS = """
from pathlib import Path
from benchmarks import quality
quality.ROWS["first"] = quality.Row("first", "tiny", ("--steps", 100_000))
quality.RECORDS, quality.PAGE = Path("records"), Path("page.md")
quality.main(["--rows", "first", "--seeds", "1"])
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Two recipes of seconds, in a place of their own; the corpus is found where it was."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MOESCOPE_DATA", os.environ.get("MOESCOPE_DATA", str(ROOT / "data")))
    monkeypatch.chdir(tmp_path)
    rows = {name: Row(name, "tiny", ("--steps", 2)) for name in ("first", "second")}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{quality.BEGIN}\nold\n{quality.END}\nafter\n")
    for name, value in {"ROWS": rows, "RECORDS": tmp_path / "records", "PAGE": page}.items():
        monkeypatch.setattr(quality, name, value)
    return rows


def losses(name: str) -> list[float]:
    return [each["training"]["validation_loss"] for each in quality.records() if each["row"] == name]


@pytest.mark.usefixtures("corpus")
def test_what_is_missing_is_trained_and_the_page_shows_every_seed(
    rows: dict[str, Row], capfd: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(["--rows", "first", "--seeds", "1", "2"]) == 0
    assert quality.main(["--rows", "second", "--seeds", "2"]) == 0
    first, second = losses("first"), losses("second")
    assert first[1:] == second, "the two recipes are the same"
    assert first[0] != first[1], "the seeds are not"
    page = quality.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert f"| first | 2 | 0.0 M | 0 | {quality.records()[0]['training']['flops']:.1e} |" in page
    assert page.count(", ".join(f"{loss:.4f}" for loss in first)) == 1
    capfd.readouterr()
    assert quality.main(["--rows", "first", "--seeds", "1"]) == 0
    assert capfd.readouterr().out == "", "what has its record is not run again"

    rows["first"] = Row("first", "tiny", ("--steps", 4))
    quality.record_of("first", 1).unlink()
    assert quality.main(["--rows", "first", "--seeds", "1"]) == 0
    log = Path("runs/quality-first-1.log").read_text()
    assert "step 4:" in log
    assert log.count("step 2: validation") == 1, "it went on from its second step"

    quality.record_of("first", 1).unlink()
    assert quality.main(["--rows", "first", "--seeds", "1"]) == 0, "it was killed between its end and its record"
    assert quality.record_of("first", 1).exists()

    rows["first"] = Row("first", "tiny", ("--steps", 4, "--dropout", 0.1))
    quality.record_of("first", 1).unlink()
    assert quality.main(["--rows", "first", "--seeds", "1"]) == 1, "what is there was trained by another recipe"
    assert "another dropout" in Path("runs/quality-first-1.log").read_text()

    rows["second"] = Row("second", "tiny", ("--steps", 0))
    assert quality.main(["--rows", "second", "--seeds", "3"]) == 1
    assert "runs/quality-second-3.log says why" in capfd.readouterr().err


@pytest.mark.usefixtures("corpus")
@pytest.mark.usefixtures("rows")
def test_a_run_that_is_stopped_leaves_no_record() -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], start_new_session=True)
    wait_until(lambda: any(Path("runs/quality-first-1").glob("step-*")))
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.wait(60)
    assert Path("runs/quality-first-1").exists()
    assert not quality.RECORDS.exists()


def test_the_page_shows_the_records_that_are_committed() -> None:
    page = quality.PAGE.read_text()
    assert quality.with_table(page) == page, "run `python -m benchmarks.quality --table`"


def test_every_record_is_of_its_row_s_recipe_as_that_is_today() -> None:
    for each in quality.records():
        assert each["training"]["config"] == quality.recipe(quality.ROWS[each["row"]], each["seed"])
        assert each["training"]["steps"] == each["training"]["config"]["steps"]


def test_a_mean_of_minutes_counts_cores_and_a_way_that_one_seed_did_not_end_is_not_told() -> None:
    training: dict[str, Any] = {
        "seconds": 600,
        "tokens": 2_000_000,
        "flops": 1e12,
        "validation_loss": 1.5,
        "max_load": 1.2,
    }
    training |= {"bits_per_character": 2.164, "best": {"step": 9, "validation_loss": 1.5}}
    reached = {"milestones": {quality.MAKEMOE: {"seconds": 60, "flops": 1e11}}}
    runs = [{"row": "strict", "seed": 1, "threads": 2, "training": training | reached}]
    assert "| 20 |" in quality.table(runs)
    assert "| 2.0, 1.0e+11 |" in quality.table(runs)
    late = {**runs[0], "seed": 2, "training": training | {"milestones": {}, "validation_loss": 1.7}}
    table = quality.table([*runs, json.loads(json.dumps(late))])
    assert "| 1.5000, 1.7000 (best 1.5000) | **1.6000** ± 0.1414 | 2.1640 |" in table
    assert "1.0e+11" not in table
