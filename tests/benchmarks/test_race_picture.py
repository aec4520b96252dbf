"""The picture of a race shows who has served, tells who has other weights, and is the same for the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contestants, race_picture


def rows(rate: float, *streams: int) -> dict[str, Any]:
    return {
        "streams": {
            str(each): {"tokens_per_second": rate * each, "first_token_ms": {"p50": 1.0, "p95": 2.0 + each}}
            for each in streams
        }
    }


CONTESTANTS = {
    "Moescope native": rows(1000, 1, 8, 64),
    "Moescope torch": {"streams": {}},  # it did not start
    "vLLM": rows(200, 1, 64),
    contestants.ROUNDED: rows(300, 1, 8, 64),
    contestants.EMPTY: rows(9000, 1, 8, 64),
}


def test_who_has_served_has_a_line_where_it_has_and_other_weights_are_dotted() -> None:
    rates, firsts = race_picture.draw({"contestants": CONTESTANTS}).axes
    told = f"{contestants.ROUNDED} (other weights)"
    lines = {str(line.get_label()): line for line in rates.get_lines()}
    assert list(lines) == ["Moescope native", told, "vLLM"]
    assert {name for name, line in lines.items() if line.get_linestyle() == ":"} == {told}
    assert [text.get_text() for text in rates.get_xticklabels()] == ["1", "8", "64"]
    assert np.asarray(lines["vLLM"].get_xydata()).tolist() == [[0, 200], [2, 12_800]]
    assert np.asarray(firsts.get_lines()[0].get_xydata()).tolist() == [[0, 3], [1, 10], [2, 66]]


def test_a_record_gives_the_same_bytes_again_and_few_of_them(tmp_path: Path) -> None:
    record = tmp_path / "race.json"
    full = {name: rows(100 * index, 1, 8, 32, 64) for index, name in enumerate(contestants.CONTESTANTS, 1)}
    record.write_text(json.dumps({"contestants": full}))
    for name in ("one.svg", "two.svg"):
        assert race_picture.main([str(record), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.svg").stat().st_size < 60_000
    assert all(
        contestants.label(name) in (tmp_path / "one.svg").read_text()
        for name in contestants.CONTESTANTS
        if name != contestants.EMPTY
    )
