"""How long and how large a request may be, and what may wait behind it. Deadlines are the server's, only shorter."""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service import body
from service import server as edge
from service.protocol import Bounds
from tests.service.conftest import StartServer
from tests.service.here import served_here
from tests.service.raw import HEAD, code_of, read_response, received
from tests.service.serving import FOR_EVER, PATIENCE_S, Samples, Server, wait_until

QUICK = Bounds(connections=8, head_s=0.5, body_s=0.5, stalled_s=1.5)
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Quick:
    """A server in this process, to look into; its deadlines are a tenth of the usual."""

    server: edge.Server
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)

    def exchange(self, sent: bytes) -> httpx.Response:
        """What comes back until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(sent)
            return read_response(connection)

    def is_idle(self) -> bool:
        return not self.server.server_state.connections and not self.server.server_state.tasks

    def num_cancelled(self) -> float:
        told = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        return Samples.parse(told).total("requests_total", outcome="cancelled")


@pytest.fixture(scope="module")
def quick(checkpoint: Path) -> Iterator[Quick]:
    flags = ("--checkpoint", checkpoint, "--threads", 1, "--slots", 2, "--max-new-tokens", FOR_EVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "BODY_S", QUICK.body_s)
        with served_here(*flags, bounds=QUICK) as here:
            here.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # little waits in the kernel, unseen
            yield Quick(here.server, here.port)


# Time and size


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /",
    ],
)
def test_a_head_that_is_late_is_a_408_and_the_end(quick: Quick, sent: bytes) -> None:
    with quick.connect() as connection:
        connection.sendall(sent)
        stop = threading.Event()
        threading.Thread(target=trickle, args=(connection, stop)).start()  # a byte now and then buys no time
        content = received(connection)  # who goes on sending is reset after the answer
        stop.set()
    assert b"\r\n\r\n" in content
    last = content[content.rindex(b"HTTP/1.1 ") :]
    assert last.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in last.lower()
    assert json.loads(last.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_connection_that_was_only_opened_is_closed_without_a_word(quick: Quick) -> None:
    assert quick.connect().makefile("rb").read() == b""


def test_a_body_that_is_late_is_a_408_and_the_end(quick: Quick) -> None:
    response = quick.exchange(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert (response.status_code, code_of(response)) == (408, "request_timeout")
    assert response.headers["connection"] == "close"


def test_a_body_that_nobody_waits_for_does_not_hold_the_connection(quick: Quick) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{")
        stop = threading.Event()
        threading.Thread(target=trickle, args=(connection, stop)).start()
        answer = received(connection)
        stop.set()
    assert answer.startswith(b"HTTP/1.1 404")
    assert b" 408 " not in answer


def test_a_body_that_comes_after_the_answer_does_not_hold_it_either(quick: Quick) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"12345")
        received(connection)  # to its end


def test_an_answer_that_takes_longer_than_a_request_may_is_not_cut(quick: Quick) -> None:
    request = generate(max_new_tokens=FOR_EVER, timeout_s=3 * QUICK.head_s)
    began = time.monotonic()
    answer = quick.exchange(request + b"\r\nGET /late").text  # what old clients send after a body, and worse
    assert time.monotonic() - began > 2 * QUICK.head_s
    assert answer.index("event: done") < answer.index("HTTP/1.1 408")


def generate(headers: str = "", **fields: object) -> bytes:
    content = json.dumps({"prompt": "", **fields}).encode()
    return HEAD + f"{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


# One request behind another


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_second_request_does_not_hide_that_the_client_leaves(quick: Quick, at_once: bool, stream: bool) -> None:
    before = quick.num_cancelled()
    wait_until(quick.is_idle)
    parts = [generate(max_new_tokens=FOR_EVER, stream=stream), LIVEZ]
    with quick.connect() as connection:
        for part in [b"".join(parts)] if at_once else parts:
            connection.sendall(part)
            wait_until(lambda: bool(quick.server.server_state.tasks))
        wait_until(lambda: has_pipelined(quick))
    wait_until(quick.is_idle)
    wait_until(lambda: quick.num_cancelled() == before + 1)  # and has not come to its end, which takes seconds


@pytest.mark.parametrize("behind", [LIVEZ * 17, HEAD + b"Content-Length: 1000000\r\n\r\n" + b"a" * 70_000])
def test_more_than_may_wait_behind_an_answer_is_the_end(quick: Quick, behind: bytes) -> None:
    before = quick.num_cancelled()
    wait_until(quick.is_idle)
    with quick.connect() as connection:
        connection.sendall(generate(max_new_tokens=FOR_EVER, stream=False))
        wait_until(lambda: bool(quick.server.server_state.tasks))
        connection.sendall(behind)
        assert received(connection).startswith(b"HTTP/1.1 400 ")
        wait_until(lambda: quick.num_cancelled() == before + 1)  # and has not come to its end


@pytest.mark.parametrize("behind", [LIVEZ * 17, b"no request at all\r\n\r\n"])
def test_what_is_wrong_behind_an_answer_on_its_way_cuts_it_off_and_puts_no_words_into_it(
    quick: Quick, behind: bytes
) -> None:
    wait_until(quick.is_idle)
    with quick.connect() as connection:
        connection.sendall(generate(max_new_tokens=FOR_EVER))
        content = b""
        while b"event: token" not in content:
            content += connection.recv(65_536)
        connection.sendall(behind)
        with suppress(ConnectionResetError):
            content += received(connection)
    assert content.count(b"HTTP/1.1 ") == 1
    wait_until(quick.is_idle)


def test_what_may_wait_behind_an_answer_is_answered(quick: Quick) -> None:
    last = LIVEZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answers = quick.exchange(generate(max_new_tokens=3) + LIVEZ * 15 + last).text
    assert answers.index("event: done") < answers.index("HTTP/1.1 200 ")
    assert answers.count("HTTP/1.1 200 ") == 16


def has_pipelined(quick: Quick) -> bool:
    return any(connection.pipeline for connection in list(quick.server.server_state.connections))  # type: ignore[union-attr]


# What clients offer, and this server leaves


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_a_request_that_offers_http_2_is_answered_as_it_stands(quick: Quick, at_once: int) -> None:
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    chunked = HEAD + offer.encode() + b"Transfer-Encoding: chunked\r\n\r\n5\r\n[1, 2\r\n1\r\n]\r\n0\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    sent = generate(offer, max_new_tokens=3) + chunked + LIVEZ[:-2] + offer.encode() + b"\r\n" + last
    with quick.connect() as connection:
        for start in range(0, len(sent), at_once):
            connection.sendall(sent[start : start + at_once])
        content = connection.makefile("rb").read()
    assert [int(answer[:3]) for answer in content.split(b"HTTP/1.1 ")[1:]] == [200, 422, 200, 200]
    assert content.count(b"event: token") == 3
    assert b"not_an_object" in content


@pytest.mark.parametrize("asked", ["bytes=5-1", "chickens=1", "bytes=99999999-", "bytes=0-9", "bytes=0-1,4-5"])
def test_a_file_comes_whole_whatever_part_is_asked_for(server: Server, asked: str) -> None:
    whole = server.client.get("/app.js")
    for headers in ({"Range": asked}, {"Range": asked, "If-Range": whole.headers["etag"]}):
        answer = server.client.get("/app.js", headers=headers)
        assert (answer.status_code, answer.content) == (200, whole.content)


ENDLESS = b"a" * 300_000


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 32_768 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 32_768 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 100 + b"\r\n",
        b"GET /" + ENDLESS,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + ENDLESS,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX" + ENDLESS,
        b"\r\n" * 200_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + ENDLESS,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 10_000,
    ],
    ids=[
        "target",
        "header",
        "headers",
        "endless-target",
        "endless-value",
        "endless-name",
        "lines",
        "trailer",
        "trailers",
    ],
)
def test_more_head_than_anyone_needs_is_a_431_and_the_end(quick: Quick, sent: bytes) -> None:
    with quick.connect() as connection:
        connection.sendall(sent)
        last = received(connection).rpartition(b"HTTP/1.1 ")[2]
    assert last.startswith(b"431 ")
    assert json.loads(last.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


def test_a_large_head_within_the_bounds_is_read(quick: Quick) -> None:
    headers = b"".join(b"X-%d: %b\r\n" % (number, b"a" * 300) for number in range(98))
    sent = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n"
    assert quick.exchange(sent).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n",  # waits in the middle
        b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8
        + b"GET /livez HTTP/1.0\r\n\r\n",  # is done, and closing
    ],
)
def test_a_client_that_does_not_read_loses_its_connection(quick: Quick, sent: bytes) -> None:
    wait_until(quick.is_idle)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", quick.port))
        connection.sendall(sent)
        wait_until(lambda: has_unsent_bytes(quick))
        wait_until(quick.is_idle)


def test_a_client_that_reads_slowly_gets_everything(quick: Quick) -> None:
    began = time.monotonic()
    size = 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        connection.connect(("127.0.0.1", quick.port))
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while chunk := connection.recv(16_384):
            size += len(chunk)
            time.sleep(0.05)
    assert time.monotonic() - began > 2 * QUICK.stalled_s
    assert size > 1_000_000


def test_connections_beyond_the_limit_are_closed_and_disturb_nobody(quick: Quick) -> None:
    wait_until(quick.is_idle)
    with quick.connect() as first:
        crowd = [quick.connect() for _ in range(3 * QUICK.connections)]
        ends = [connection.makefile("rb").read() for connection in crowd[QUICK.connections :]]
        first.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_response(first).status_code == 200
    assert set(ends) == {b""}


def trickle(connection: socket.socket, stop: threading.Event) -> None:
    while not stop.wait(0.1):
        try:
            connection.sendall(b"a")
        except OSError:
            return


def has_unsent_bytes(quick: Quick) -> bool:
    return any(
        connection.transport.get_write_buffer_size() for connection in list(quick.server.server_state.connections)
    )


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs ulimit")
def test_a_flood_of_connections_does_not_use_up_the_descriptors(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 400\nulimit -S -n 64\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    server = start_server().wait_until_ready()
    flood = [socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(600)]
    wait_until(
        lambda: len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) > 200
    )  # more than the soft limit was
    for connection in flood:
        connection.close()
    wait_until(lambda: answers(server))
    assert server.answer(max_new_tokens=3)["usage"]["generated_tokens"] == 3
    assert server.client.get("/app.js").status_code == 200
    assert "Traceback" not in server.log


def answers(server: Server) -> bool:
    try:
        return server.client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False
