"""The race: every server is asked in its own words and counted alike, and one that fails is told and left behind."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import race
from benchmarks.client import MOESCOPE, closed_loop, openai
from benchmarks.over_http import NoServer, cpu_seconds, measure, peak_mib
from benchmarks.race import Running, Setting
from benchmarks.workload import Workload
from model import checkpoint
from tests.checkpoints import CHARACTERS, tiny_checkpoint
from tests.service.serving import Server

WORKLOAD = Workload(requests=2, new_tokens=12, prompt_characters=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("race") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder.parent / "log", "--checkpoint", folder, "--slots", 2, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def test_openai_s_words_are_counted_as_ours_are(server: Server) -> None:
    """The same requests; what no token has, such as the chunk that tells why a text ended, counts for nothing."""
    ours, theirs = (
        closed_loop(server.url, WORKLOAD.queues(CHARACTERS, 3), dialect)
        for dialect in (MOESCOPE, openai("tiny", seed=1))
    )
    assert [len(answer.token_times) for answer in theirs] == [len(answer.token_times) for answer in ours] == [12] * 6


def test_the_empty_server_answers_every_token_and_is_nobody_s_peer(folder: Path, tmp_path: Path) -> None:
    setting = Setting(checkpoint.load(folder), 2, 1, tmp_path, tmp_path)
    with race.nobody(setting) as running:
        answers = closed_loop(running.url, WORKLOAD.queues(CHARACTERS, 3), running.dialect)
    assert [len(answer.token_times) for answer in answers] == [12] * 6
    row = {"streams": {1: {"tokens_per_second": 900.0}}}
    assert race.ratios({"Moescope": row, race.EMPTY: row}) == {}


def test_a_server_s_cpu_and_memory_are_those_of_its_process(server: Server) -> None:
    pid = server.process.pid
    before = cpu_seconds(pid)
    longer = replace(WORKLOAD, new_tokens=4000)  # the system counts in hundredths of a second
    trial = measure(server.url, longer, 2, CHARACTERS, openai("tiny"), pid)
    assert 0 < (trial.server_cpu_seconds or 0) <= cpu_seconds(pid) - before
    assert 50 < peak_mib(pid) < 4000
    assert cpu_seconds(None) == 0


def test_they_take_turns_and_who_fails_is_told_and_left_behind(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    @contextmanager
    def good(_: Setting) -> Iterator[Running]:
        turns.append("good")
        yield Running(server.url, server.process.pid, openai("tiny"))

    def bad(_: Setting) -> AbstractContextManager[Running]:
        turns.append("bad")
        raise NoServer("it is not there")

    monkeypatch.setattr(race, "CONTESTANTS", {"Moescope": good, "another": good, "absent": bad})
    arguments = argparse.Namespace(contestants=["Moescope", "another", "absent"], streams=[1, 2], rounds=2)
    setting = Setting(checkpoint.load(folder), 2, 1, tmp_path, tmp_path)
    found = race.figures(race.compete(setting, arguments, WORKLOAD))
    assert turns == ["good", "good", "bad", "good", "good"]
    assert found["absent"] == {"peak_mib": 0, "trouble": "it is not there", "streams": {}}
    assert [len(found["another"]["streams"][streams]["rounds"]) for streams in (1, 2)] == [2, 2]
    assert race.table(found).count("| another |") == 2
    assert "absent" not in race.table(found)


def test_the_ratio_is_of_our_best_to_the_best_of_the_others_where_both_have_served() -> None:
    def served(**rates: float) -> dict[str, object]:
        return {"streams": {int(name[1:]): {"tokens_per_second": rate} for name, rate in rates.items()}}

    found = {"Moescope a": served(s1=50, s8=300), "Moescope b": served(s1=200, s8=100), "c": served(s1=100)}
    assert race.ratios(found | {"d": served(s1=40, s32=7)}) == {1: 2.0}


def test_who_has_other_weights_is_told_and_is_no_peer(folder: Path, tmp_path: Path) -> None:
    row = {
        "tokens_per_second": 100.0,
        "first_token_ms": {"p50": 1.0, "p95": 2.0},
        "inter_token_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "cpu_us_per_token": 4.0,
        "client_cpu_us_per_token": 5.0,
    }
    found = {"Moescope": {"streams": {1: row}}, "llama.cpp Q8_0": {"streams": {1: row | {"tokens_per_second": 900.0}}}}
    assert race.ratios(found) == {}
    assert race.ratios(found | {"llama.cpp F32": {"streams": {1: row | {"tokens_per_second": 50.0}}}}) == {1: 2.0}
    assert "| 1 | llama.cpp Q8_0 (other weights) | 900 |" in race.table(found)
    assert "| 1 | Moescope | 100 |" in race.table(found)
    setting = Setting(checkpoint.load(folder), 2, 1, tmp_path, tmp_path)
    assert setting.gguf("q8_0").stat().st_size < setting.gguf("bf16").stat().st_size
