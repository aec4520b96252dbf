"""docs/walkthrough.py: it runs and all it asserts holds, and the notebook beside it has the same cells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from training.corpora import Corpus

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "walkthrough.py"
NOTEBOOK = nbformat.read(SCRIPT.with_suffix(".ipynb"), as_version=4)

SMALL = """# %% [markdown]
# Two numbers

# %%
number = 1
print(number)

# %%
print(number + 1)
"""


def cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def printed(notebook: NotebookNode) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []))


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_walkthrough_runs_and_its_claims_hold(corpus: Corpus) -> None:
    done = run(SCRIPT, STEPS="20")
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"loss before (\S+), after (\S+)", done.stdout)[0])
    assert before == 4.174
    assert after < 3.2, "20 steps teach it how often each character comes, at least"


def test_its_exercises_can_be_done(corpus: Corpus, tmp_path: Path) -> None:
    """More and narrower experts, no balance loss, and noise in its place."""
    source = SCRIPT.read_text()
    for before, after in (
        ('"num_experts": 8', '"num_experts": 16'),
        ('"expert_size": 96', '"expert_size": 48'),
        ("warmup_steps=10", 'warmup_steps=10, balance_weight=0.0, router_noise="gaussian"'),
    ):
        assert source.count(before) == 1
        source = source.replace(before, after)
    (tmp_path / "exercise.py").write_text(source)
    done = run(tmp_path / "exercise.py", STEPS="2", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "expert 15" in done.stdout


def test_the_notebook_has_the_cells_of_the_script() -> None:
    nbformat.validate(NOTEBOOK)
    assert len(NOTEBOOK.cells) > 50
    assert cells(NOTEBOOK) == cells(jupytext.read(SCRIPT)), "run `make walkthrough`"


def test_the_notebook_shows_a_training_of_the_full_length() -> None:
    steps = re.findall(r'"STEPS", "(\d+)"', SCRIPT.read_text())
    assert f"step {int(steps[0]) - 1:4}: loss" in printed(NOTEBOOK)
    pairs, ours = map(float, re.findall(r"pairs: (\S+), our model: (\S+)", printed(NOTEBOOK))[0])
    assert ours < pairs - 0.5


def test_code_cells_are_short_and_most_of_them_check_what_they_show() -> None:
    code = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 15
    checked = [source for source in code if re.search(r"^\s*(assert |same\()", source, re.MULTILINE)]
    assert len(checked) > 0.7 * len(code)


def test_a_notebook_is_made_with_what_its_cells_print(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    done = run("scripts/walkthrough.py", tmp_path / "small.py")
    assert done.returncode == 0, done.stderr
    made = nbformat.read(tmp_path / "small.ipynb", as_version=4)
    assert printed(made) == "1\n2\n"
    assert [cell.id for cell in made.cells] == ["cell-0", "cell-1", "cell-2"]
    assert cells(made)[0] == ("markdown", "Two numbers")


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL + "\n# %%\nassert number == 2\n")
    (tmp_path / "small.ipynb").write_text("before")
    assert "AssertionError" in run("scripts/walkthrough.py", tmp_path / "small.py").stderr
    assert (tmp_path / "small.ipynb").read_text() == "before"
