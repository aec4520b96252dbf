"""``GET /experts/report``: what the checkpoint's own report found of each expert, or nothing rather than a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.card import ModelCard
from service.expert_report import FILE, ExpertReport
from tests.checkpoints import tiny_checkpoint, tiny_report
from tests.service.conftest import StartServer
from tests.service.serving import ROOT, Server

NOTHING = {"favourites": None, "causal_map": None}
COSTS = [[0.1] * 4] * 3


def told_by(start_server: StartServer, folder: Path, report: dict[str, Any] | None) -> tuple[Server, Any]:
    if report is not None:
        (folder / FILE).write_text(json.dumps(report))
    server = start_server("--checkpoint", folder).wait_until_it_listens()
    return server, server.client.get("/experts/report").json()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "reported")


def test_it_tells_what_the_report_says_of_the_experts(start_server: StartServer, folder: Path) -> None:
    report = tiny_report(folder)
    _, told = told_by(start_server, folder, report)
    assert told == {name: report[name] for name in NOTHING}


def test_it_tells_nothing_without_a_report(start_server: StartServer, folder: Path) -> None:
    server, told = told_by(start_server, folder, None)
    assert told == NOTHING
    assert "report" not in server.log


def test_a_report_of_other_weights_is_left_out_and_logged(start_server: StartServer, folder: Path) -> None:
    server, told = told_by(start_server, folder, tiny_report(folder, fingerprint="0" * 64))
    assert told == NOTHING
    assert "report_of_another_checkpoint" in server.log


@pytest.mark.parametrize(
    ("change", "event"),
    [
        ({"favourites": [[[]] * 4] * 2}, "report_of_another_checkpoint"),
        ({"causal_map": {"windows": 2, "baseline": 4.1, "cost": [[0.1] * 3] * 3, "standard_error": COSTS}}, "another"),
        ({"causal_map": {"windows": 2, "baseline": float("nan"), "cost": COSTS, "standard_error": COSTS}}, "unread"),
        ({"favourites": "all of them"}, "report_unread"),
        ({"favourites": [[[{"token": "\ud800", "lift": 2.0, "taken": 0.5}]] * 4] * 3}, "report_unread"),
        (None, "report_unread"),
    ],
    ids=["other layers", "other experts", "NaN", "other kind", "half a pair", "no JSON"],
)
def test_so_is_a_report_that_cannot_be_right(
    folder: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any] | None, event: str
) -> None:
    (folder / FILE).write_text("{" if change is None else json.dumps(tiny_report(folder, **change)))
    assert ModelCard.read(folder).expert_report == ExpertReport()
    assert [event in message for message in caplog.messages] == [True]


def test_the_shipped_checkpoint_has_a_report_of_its_own_weights(start_server: StartServer) -> None:
    server = start_server("--checkpoint", ROOT / "checkpoints" / "shakespeare").wait_until_it_listens()
    told = server.client.get("/experts/report").json()
    assert len(told["favourites"]) == len(told["causal_map"]["cost"]) == 6
