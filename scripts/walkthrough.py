"""Makes docs/walkthrough.ipynb from docs/walkthrough.py: the same cells, each with what it printed when run here.

Needs no Jupyter. A cell that fails ends it, and the notebook stays as it was.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

SOURCE = Path(__file__).parents[1] / "docs" / "walkthrough.py"


def run(notebook: NotebookNode) -> None:
    """Run the code cells in one namespace, as a kernel would, and put what each printed below it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # not random, so that the file changes only where a cell does
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = printed_by(cell.source, namespace)


def printed_by(source: str, namespace: dict[str, Any]) -> list[NotebookNode]:
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "<cell>", "exec"), namespace)
    return [nbformat.v4.new_output("stream", name="stdout", text=out.getvalue())] if out.getvalue() else []


def main(source: Path) -> None:
    notebook = jupytext.read(source)
    run(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
