"""``python -m benchmarks.race_picture``: a race's record as the README's picture, docs/race.svg.

Both scales are logarithmic: the contestants lie up to a hundredfold apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.contestants import CONTESTANTS, EMPTY, NO_PEERS, OURS, label
from benchmarks.record import newest, refusing

PICTURE = Path("docs/race.svg")
# Okabe and Ito's, which colour-blind readers can tell apart; each has a mark of its own besides.
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#999999", "#009e73", "#cc79a7")
LOOKS = dict(zip([name for name in CONTESTANTS if name != EMPTY], zip(COLOURS, "osv^DPX", strict=True), strict=True))
PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("tokens per second, more is better", lambda row: row["tokens_per_second"]),
    ("first token, 95th percentile, ms, less is better", lambda row: row["first_token_ms"]["p95"]),
)


def draw(record: dict[str, Any]) -> Figure:
    """Every contestant that has served, by the number of streams. The empty server is none."""
    found = record["contestants"]
    served = {name: found[name]["streams"] for name in LOOKS if name in found and found[name]["streams"]}
    counts = sorted({int(streams) for rows in served.values() for streams in rows})
    figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
    for number, (title, value) in enumerate(PANELS, 1):
        axes = figure.add_subplot(1, len(PANELS), number)
        for name, rows in served.items():
            colour, mark = LOOKS[name]
            line, width = ":" if name in NO_PEERS else "-", 2.5 if name.startswith(OURS) else 1.3
            places, values = [counts.index(int(streams)) for streams in rows], [value(row) for row in rows.values()]
            axes.plot(places, values, label=label(name), color=colour, marker=mark, ms=5, ls=line, lw=width)
        _dress(axes, title, counts)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _dress(axes: Axes, title: str, counts: Sequence[int]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(counts)), list(map(str, counts)))
    axes.set_xlabel("streams at the same time")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race_picture", description="Draw the record of a race.")
    parser.add_argument("record", type=Path, nargs="?", metavar="JSON", help="the latest of benchmarks/results")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="SVG")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    record = arguments.record or refusing("race_picture", lambda: newest("race"))
    if record is None:
        return 1
    # A salt and no date: the same record gives the same bytes. Letters as outlines would double the file.
    with rc_context({"svg.hashsalt": "race", "svg.fonttype": "none"}):
        draw(json.loads(record.read_text())).savefig(arguments.out, metadata={"Date": None})
    print(f"{arguments.out}, from {record}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
