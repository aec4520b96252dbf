"""The race: every server is asked in its own words and counted alike, and one that fails is told and left behind."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import contestants, llama_server, race, report
from benchmarks.client import MOESCOPE, closed_loop, openai
from benchmarks.contestants import UNFILTERED, Running, Setting
from benchmarks.environments import PeerFailed
from benchmarks.over_http import NoServer, cpu_seconds, measure, peak_mib
from benchmarks.race import Standing
from benchmarks.record import Trouble
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
    with contestants.nobody(setting) as running:
        answers = closed_loop(running.url, WORKLOAD.queues(CHARACTERS, 3), running.dialect)
    assert [len(answer.token_times) for answer in answers] == [12] * 6
    row = {"trouble": None, "streams": {1: {"rounds": [900.0]}}}
    assert race.ratios({"Moescope": row, contestants.EMPTY: row}) == {}


def test_a_server_s_cpu_and_memory_are_those_of_its_process(server: Server) -> None:
    pid = server.process.pid
    before = cpu_seconds(pid)
    longer = replace(WORKLOAD, new_tokens=4000)  # the system counts in hundredths of a second
    trial = measure(server.url, longer, 2, CHARACTERS, openai("tiny"), pid)
    assert 0 < trial.server_cpu_seconds <= cpu_seconds(pid) - before
    assert 50 < peak_mib(pid) < 4000


def test_they_take_turns_and_who_fails_once_is_told_left_behind_and_has_no_figures(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    @contextmanager
    def good(_: Setting) -> Iterator[Running]:
        turns.append("good")
        yield Running(server.url, server.process.pid, openai("tiny", **UNFILTERED), {"version": "1"})

    def bad(_: Setting) -> AbstractContextManager[Running]:
        turns.append("bad")
        raise NoServer("it is not there")

    def tired(setting: Setting) -> AbstractContextManager[Running]:
        return bad(setting) if len(turns) > 4 else good(setting)

    starters = {"Moescope": good, "another": good, "absent": bad, "tired": tired}
    monkeypatch.setattr(race, "CONTESTANTS", starters)
    arguments = argparse.Namespace(contestants=list(starters), streams=[1, 2], rounds=2)
    setting = Setting(checkpoint.load(folder), 2, 1, tmp_path, tmp_path)
    found = race.figures(race.compete(setting, arguments, WORKLOAD))
    assert turns == ["good", "good", "bad", "good", "good", "good", "bad"]
    assert found["absent"]["trouble"] == found["tired"]["trouble"] == "it is not there"
    assert found["absent"]["streams"] == found["tired"]["streams"] == {}, "its one round is no median of two"
    assert [len(found["another"]["streams"][streams]["rounds"]) for streams in (1, 2)] == [2, 2]
    assert found["another"]["about"] == {"version": "1"}
    assert race.ratios(found) == {}, "the absent may be the quickest"
    assert race.ratios({name: found[name] for name in ("Moescope", "another")}).keys() == {1, 2}
    table = race.table({"contestants": found, "ratios": {}})
    assert table.count("| another |") == 2
    assert "| tired |" not in table
    assert "tired is out: it is not there" in table


SERVED, FAILED = Standing({}), Standing({}, trouble="no")


@pytest.mark.parametrize(
    "standings",
    [
        {"Moescope native": FAILED, "Moescope torch": SERVED, "vLLM": SERVED},
        {"Moescope native": SERVED, "vLLM": FAILED, "llama.cpp F32": FAILED, contestants.ROUNDED: SERVED},
        {contestants.ROUNDED: FAILED, contestants.EMPTY: FAILED},
    ],
    ids=["one of ours is missing", "no peer has served", "nobody has"],
)
def test_a_race_without_us_or_without_peers_is_none(standings: dict[str, Standing]) -> None:
    with pytest.raises(Trouble, match=r": no$"):
        race.require_a_race(standings)


def test_a_race_in_which_one_peer_has_failed_or_none_was_asked_is_one() -> None:
    race.require_a_race(
        {"Moescope native": SERVED, "vLLM": FAILED, "llama.cpp F32": SERVED, contestants.ROUNDED: FAILED}
    )
    race.require_a_race({"Moescope native": SERVED, contestants.EMPTY: SERVED})


def test_what_nobody_of_the_peers_can_take_ends_in_a_line_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp has no two levels of gating: the export refuses, before anything is compiled."""
    folder = tiny_checkpoint(tmp_path / "groups", num_groups=2, groups_per_token=1, context_length=256)
    only = ["--contestants", "llama.cpp F32", "--streams", "1", "--rounds", "1", "--results", str(tmp_path / "results")]
    assert race.main(["--checkpoint", str(folder), *only]) == 1
    told = capsys.readouterr()
    assert "nothing is kept: llama.cpp F32: " in told.err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_the_ratio_is_the_median_of_the_rounds_of_our_best_to_the_best_of_the_others() -> None:
    def served(**rounds: list[float]) -> dict[str, object]:
        return {"trouble": None, "streams": {int(name[1:]): {"rounds": rates} for name, rates in rounds.items()}}

    ours = {"Moescope a": served(s1=[50.0, 50.0, 50.0], s8=[300.0]), "Moescope b": served(s1=[200.0, 20.0, 40.0])}
    theirs = {"c": served(s1=[100.0, 10.0, 20.0]), "d": served(s1=[4.0, 25.0, 4.0], s32=[7.0])}
    assert race.ratios(ours | theirs) == {1: 2.0}, "of 2, 2 and 2.5; of medians it would be 50 over 20"


def test_what_others_do_is_known_by_the_contestant_whatever_becomes_of_its_children(server: Server) -> None:
    trial = measure(server.url, replace(WORKLOAD, new_tokens=2000), 2, CHARACTERS, openai("tiny"), server.process.pid)
    told = report.cores_of_others([replace(trial, others_cpu_seconds=trial.seconds * others) for others in (0.1, 0.5)])
    assert told == 0.3
    assert report.cores_of_others([]) is None


def test_llama_cpp_is_not_compiled_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    half = llama_server.build_folder(tmp_path / "peers") / "bin" / "llama-server"
    half.parent.mkdir(parents=True)
    half.touch()  # as a linker may leave it
    with pytest.raises(PeerFailed, match="no C and C"):
        llama_server.program(tmp_path / "peers")
    assert not (half.parents[2] / "tools").exists()


def test_who_has_other_weights_is_told_and_is_no_peer(folder: Path, tmp_path: Path) -> None:
    row = {
        "rounds": [100.0],
        "tokens_per_second": 100.0,
        "first_token_ms": {"p50": 1.0, "p95": 2.0},
        "inter_token_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "cpu_us_per_token": 4.0,
        "client_cpu_us_per_token": 5.0,
    }
    found = {
        "Moescope": {"trouble": None, "streams": {1: row}},
        contestants.ROUNDED: {"trouble": None, "streams": {1: row | {"rounds": [900.0], "tokens_per_second": 900.0}}},
    }
    assert race.ratios(found) == {}
    another = {"trouble": None, "streams": {1: row | {"rounds": [50.0]}}}
    assert race.ratios(found | {"llama.cpp F32": another}) == {1: 2.0}
    table = race.table({"contestants": found, "ratios": {}})
    assert "| 1 | llama.cpp Q8_0 (other weights) | 900 |" in table
    assert "| 1 | Moescope | 100 |" in table
    setting = Setting(checkpoint.load(folder), 2, 1, tmp_path, tmp_path)
    assert setting.gguf("q8_0").stat().st_size < setting.gguf("bf16").stat().st_size
