"""The simulation agrees with what queueing theory knows exactly, and with common sense where it knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import capacity
from benchmarks.capacity import Service, measured_rates, most_per_second, simulate, step_times
from benchmarks.record import Trouble

MEASURED = {1: 115.7, 8: 603.4, 32: 1378.5, 64: 1922.4}


def test_a_step_takes_what_was_measured_and_lies_between_where_nothing_was() -> None:
    step_s = step_times(MEASURED)
    for rows, rate in MEASURED.items():
        assert step_s(rows) == pytest.approx(rows / rate)
    assert step_s(20) == pytest.approx((step_s(8) + step_s(32)) / 2)
    assert step_s(96) - step_s(64) == pytest.approx(step_s(64) - step_s(32))


def test_one_slot_waits_as_a_queue_of_one_server_does() -> None:
    """M/M/1: at 0.7 of what it can do, a request waits 0.7 / 0.3 of the mean service time."""
    service = Service(1, slots=1, queue=10**9, step_s=lambda rows: 0.005)
    told = simulate(service, 0.7 / 0.2, requests=40_000, tokens=40)
    waited = sum(told.first_token_s) / len(told.first_token_s) - 0.005
    assert waited == pytest.approx(0.2 * 0.7 / 0.3, rel=0.1)


def test_a_full_house_refuses_the_part_that_erlang_says() -> None:
    """M/M/c/c, Erlang's B: four slots, no queue, three asked for at a time refuse 0.2061."""
    service = Service(1, slots=4, queue=0, step_s=lambda rows: 0.005)
    assert simulate(service, 3 / 0.2, requests=40_000, tokens=40).refused == pytest.approx(0.2061, abs=0.012)


def test_nobody_waits_where_there_is_room_and_a_token_takes_a_step() -> None:
    service = Service(3, slots=64, queue=8, step_s=lambda rows: 0.01)
    told = simulate(service, 5.0, requests=2000, tokens=50)
    assert told.refused == 0
    assert max(told.first_token_s) <= 0.02 + 1e-9  # the step that is under way, and its own
    assert told.token_s == pytest.approx(0.01)


def test_more_replicas_take_more_and_more_slots_too() -> None:
    def most(replicas: int, slots: int) -> float:
        service = Service(replicas, slots, 64, step_times(MEASURED))
        return most_per_second(service, within_s=0.5, requests=1500 * replicas, tokens=150)[0]

    one, two, many_slots = most(1, 16), most(2, 16), most(1, 64)
    assert one < many_slots
    assert 1.7 * one < two < 2.4 * one
    assert many_slots < MEASURED[64] / 150


def test_the_table_has_a_row_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["--replicas", "1", "2", "--slots", "8", "--tokens", "30"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["1", "2"]


def test_rates_are_the_newest_of_an_engine_that_make_bench_has_kept(tmp_path: Path) -> None:
    def keep(name: str, **engine: object) -> None:
        (tmp_path / name).write_text(json.dumps({"figures": [{"streams": n, **engine} for n in (1, 8)]}))

    with pytest.raises(Trouble):
        measured_rates(None, tmp_path)
    keep("http-2026-11-26.json", engine={"tokens_per_second": 1.0})
    keep("http-2026-11-26T120000.json", engine={"tokens_per_second": 2.0})
    keep("http-2026-11-27T120000.json", engine=None)
    (tmp_path / "http-2026-11-28T120000.json").write_text('{"figures": [')
    assert measured_rates(None, tmp_path)[0].name == "http-2026-11-26T120000.json"
    assert measured_rates(tmp_path / "http-2026-11-26.json")[0].name == "http-2026-11-26.json"
    with pytest.raises(Trouble):
        measured_rates(tmp_path / "http-2026-11-27T120000.json")
