"""A test that is marked `alone` runs beside no other, and gets its turn however many others there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPAN = """
import json, pathlib, time

def span(name):
    began = time.monotonic()
    time.sleep(0.1)  # so that others have time to overlap
    with pathlib.Path("spans").open("a") as file:
        file.write(json.dumps([name, began, time.monotonic()]) + "\\n")
"""
MANY = """
import pytest
from span import span

@pytest.mark.parametrize("n", range(12))
def test_many(n):
    span("many")
"""
SOME = """
import pytest
from span import span

@pytest.mark.alone
@pytest.mark.parametrize("n", range(3))
def test_alone(n):
    span("alone")
"""


def test_nothing_runs_beside_it_and_everything_else_runs_side_by_side(tmp_path: Path) -> None:
    for name, text in {"span": SPAN, "test_many": MANY, "test_more": MANY, "test_some": SOME}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers = alone\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.alone", "--numprocesses", "3", "--dist", "loadfile"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    overlaps = [
        (one[0], other[0]) for one in spans for other in spans if one is not other and one[1] <= other[1] < one[2]
    ]
    assert len(spans) == 27
    assert ("many", "many") in overlaps
    assert not any("alone" in pair for pair in overlaps)
    last_of_all = max(ended for _, _, ended in spans)
    assert min(ended for name, _, ended in spans if name == "alone") < last_of_all - 0.3, "it waited for all the others"
