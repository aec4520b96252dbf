"""The benchmark counts what the server sends, and says nothing when it cannot. Real processes, a tiny checkpoint."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import client, report
from benchmarks.engine import EngineTrial
from benchmarks.over_http import HttpTrial
from benchmarks.workload import Request, Workload
from tests.checkpoints import CHARACTERS, tiny_checkpoint
from tests.service.serving import ROOT, Server

WORKLOAD = Workload(requests=2, new_tokens=12, prompt_characters=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bench")
    server = Server(folder / "log", "--checkpoint", tiny_checkpoint(folder / "tiny"), "--slots", 2, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def bench(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@contextmanager
def a_server_that_says(*pieces: bytes) -> Iterator[str]:
    """Answers the first request with these pieces, each of which is read by itself, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(1 << 16)
                for piece in pieces:
                    connection.sendall(piece)
                    paused.wait(0.02)

        paused = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def ended(tokens: int) -> bytes:
    return b'event: done\ndata: {"usage":{"generated_tokens":%d}}\n\n\r\n0\r\n\r\n' % tokens


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
EVENT = b'event: token\ndata: {"text":"\\nevent: token\\n"}\n\n'


def test_the_client_counts_every_token_of_every_answer_and_keeps_the_connections(server: Server) -> None:
    answers = client.closed_loop(server.url, WORKLOAD.queues(CHARACTERS, streams=3))
    assert [len(answer.token_times) for answer in answers] == [12] * 6
    for answer in answers:
        assert len(answer.gaps) == 11
        assert min(answer.gaps) >= 0
        assert sum(answer.gaps) == pytest.approx(answer.token_times[-1] - answer.token_times[0])
        assert answer.sent_at < answer.token_times[0] <= answer.token_times[-1] <= answer.ended_at


def test_a_server_that_closes_after_every_answer_is_asked_on_a_new_connection() -> None:
    text = HEAD + EVENT * 3 + ended(3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_and_close() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(text)

        thread = threading.Thread(target=answer_and_close)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answers = client.closed_loop(url, [[Request("a", 0, 3), Request("b", 1, 3)]])
        thread.join()
    assert [len(answer.token_times) for answer in answers] == [3, 3]


def test_a_token_is_counted_once_however_its_event_is_cut() -> None:
    text = HEAD + EVENT * 3 + ended(3)
    for cut in range(len(HEAD), len(HEAD) + len(EVENT), 7):
        with a_server_that_says(text[:cut], text[cut:]) as url:
            (answer,) = client.closed_loop(url, [[Request("a", 0, 3)]])
        assert len(answer.token_times) == 3
        assert answer.gaps[-1] == 0, "the last two arrived together"


@pytest.mark.parametrize(
    "pieces",
    [
        (HEAD + EVENT * 3 + ended(4),),
        (HEAD + EVENT * 2 + ended(2),),
        (HEAD + EVENT * 3,),
        (HEAD + EVENT * 3 + b"event: error\ndata: {}\n\n\r\n0\r\n\r\n",),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n",),
    ],
    ids=["miscounted", "too few", "cut off", "an error", "refused"],
)
def test_an_answer_that_is_not_what_was_asked_is_no_measurement(pieces: tuple[bytes, ...]) -> None:
    with a_server_that_says(*pieces) as url, pytest.raises(client.BrokenAnswer):
        client.closed_loop(url, [[Request("a", 0, 3)]])


def test_no_two_requests_are_alike_not_even_in_the_warm_up_and_every_call_asks_the_same() -> None:
    trials = [each.queues(CHARACTERS, streams) for each in (WORKLOAD, WORKLOAD.warm_up()) for streams in (1, 4)]
    assert trials[1] == WORKLOAD.queues(CHARACTERS, streams=4)
    requests = [request for queues in trials for queue in queues for request in queue]
    assert len(requests) == 2 + 8 + 1 + 4
    assert len({request.prompt for request in requests}) == len({request.seed for request in requests}) == len(requests)
    assert {len(request.prompt) for request in requests} == {20}


def test_many_streams_have_fewer_requests_each_and_more_together() -> None:
    whole = Workload(requests=64)
    assert [whole.each(streams) for streams in (1, 8, 32, 64, 1000)] == [64, 16, 6, 4, 2]
    assert [len(queue) for queue in whole.queues(CHARACTERS, 8)] == [16] * 8
    assert Workload(requests=1).each(64) == 1


def test_percentiles_are_of_all_gaps_and_the_share_is_of_each_round() -> None:
    rounds = [[0.001] * 99, [0.101]]
    http = [
        HttpTrial([client.Answer(0.0, [sum(gaps[:n]) for n in range(len(gaps) + 1)], 1.0)], 0.5, 2.0, 0.0)
        for gaps in rounds
    ]
    engine = [EngineTrial(100, 200.0, 250.0, 1.0), EngineTrial(2, 2.0, None, 1.0)]
    figures = report.figures(1, engine, http)
    assert figures["http"]["inter_token_ms"] == pytest.approx({"p50": 1, "p95": 1, "p99": 1})
    assert figures["shares"] == [0.5, 1.0]
    assert figures["share"] == 0.75
    assert figures["engine"]["decode_tokens_per_second"] == 250
    assert figures["http"]["cpu_us_per_token"] == pytest.approx(4.0 / 102 * 1e6, abs=0.1)
    assert "75.0%" in report.table([figures])


def test_engine_and_http_take_turns_and_the_line_it_prints_is_kept(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    flags = ("--streams", 1, 2, "--rounds", 1, "--requests", 1, "--new-tokens", 10, "--threads", 1)
    run = bench("--checkpoint", checkpoint, *flags, "--results", tmp_path / "results")
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[-1]
    (kept,) = (tmp_path / "results").glob("http-*.json")
    assert kept.read_text() == line + "\n"
    rows = json.loads(line)["figures"]
    assert [row["streams"] for row in rows] == [1, 2]
    for row in rows:
        assert row["engine"]["tokens_per_second"] > 0
        assert row["share"] == pytest.approx(
            row["http"]["tokens_per_second"] / row["engine"]["tokens_per_second"], rel=0.01
        )


@pytest.mark.parametrize("module", ["", ".race", ".counting", ".native", ".drift", ".interop"])
def test_a_checkpoint_that_is_not_there_is_one_line_and_nothing_is_kept(module: str, tmp_path: Path) -> None:
    results = () if module == ".interop" else ("--results", str(tmp_path))
    command = [sys.executable, "-m", f"benchmarks{module}", "--checkpoint", "/nowhere", *results]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.splitlines()[0].endswith(
        "/nowhere is no folder; --checkpoint names a folder with a manifest.json"
    )
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_names_the_flags() -> None:
    run = bench("--help")
    assert run.returncode == 0
    assert "--streams" in run.stdout
