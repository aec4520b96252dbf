"""Who may ask, and how long and how large a request may be. Deadlines are the server's own, only shorter."""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service import body
from service import server as edge
from service.guard import CrossOrigin, Hosts, split_list
from service.middleware import RequestScope
from service.protocol import Bounds
from service.settings import read_settings
from tests.service.conftest import StartServer
from tests.service.here import served_here
from tests.service.serving import FOR_EVER, PATIENCE_S, Samples, Server, run_to_the_end, wait_until

KEY = "not-for-the-log"
ORIGIN = "https://pages.test"
ASKING = {"Origin": ORIGIN}
KNOWN = {"Authorization": f"Bearer {KEY}"}
QUICK = Bounds(connections=8, head_s=0.5, body_s=0.5, stalled_s=1.5)
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def locked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It has a key, pages of another origin, and room for one request."""
    log = tmp_path_factory.mktemp("locked") / "log"
    flags = ("--api-key", KEY, "--allow-origin", f"https://other.test, {ORIGIN}/", "--slots", 1, "--queue", 0)
    server = Server(log, "--checkpoint", checkpoint, "--threads", 1, "--max-new-tokens", FOR_EVER, *flags)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


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


def read_response(connection: socket.socket) -> httpx.Response:
    head, _, content = connection.makefile("rb").read().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return httpx.Response(int(first.split()[1]), headers=[_pair(line) for line in lines], content=content)


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value


def code_of(response: httpx.Response) -> str:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return str(error["code"])


# The key


def test_the_schema_says_what_needs_the_key_and_all_of_that_does(locked: Server) -> None:
    schema = locked.client.get("/openapi.json", headers=KNOWN).json()
    assert schema["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    operations = {
        (method, path): "security" in operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    assert {path for (_, path), is_closed in operations.items() if not is_closed} == {"/livez", "/readyz"}
    for (method, path), is_closed in operations.items():
        assert (locked.client.request(method, path).status_code == 401) == is_closed, path
        assert locked.client.request(method, path, headers=KNOWN).status_code != 401


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xe9"],
)
def test_a_wrong_key_or_none_is_a_401_that_says_what_is_missing(locked: Server, authorization: str | None) -> None:
    headers = {} if authorization is None else {b"Authorization": authorization.encode("latin-1")}
    for path in ("/info", "/openapi.json", "/metrics", "/v1/models", "/nothing/here"):
        response = locked.client.get(path, headers=headers)
        assert (response.status_code, code_of(response)) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_page_the_reference_and_the_probes_need_no_key(locked: Server) -> None:
    for path in ("/", "/index.html", "/app.js", "/docs", "/docs.js", "/docs/swagger-ui.css", "/livez", "/readyz"):
        assert locked.client.get(path).status_code == 200, path
        assert locked.client.head(path).status_code == 200, path
    assert locked.client.post("/livez").status_code == 405


def test_a_stranger_is_refused_and_counted_before_the_body_has_come(locked: Server) -> None:
    before = locked.client.get("/metrics", headers=KNOWN).text
    with socket.create_connection(("127.0.0.1", locked.port), PATIENCE_S) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: 60000\r\n\r\n")
        assert read_response(connection).status_code == 401
    after = locked.client.get("/metrics", headers=KNOWN).text
    line = 'moescope_requests_total{outcome="unauthorized",stream="false"} '
    assert float(after.split(line)[1].split()[0]) == float(before.split(line)[1].split()[0]) + 1


def test_the_key_is_shown_nowhere(locked: Server) -> None:
    told = [locked.client.get(path, headers=KNOWN).text for path in ("/info", "/openapi.json", "/metrics", "/docs.js")]
    told += [locked.log, run_to_the_end("--help", MOESCOPE_API_KEY=KEY).stdout, repr(read_settings(["--api-key", KEY]))]
    assert all(KEY not in text for text in told)
    assert "Traceback" not in locked.log


def test_metrics_can_be_left_open(start_server: StartServer) -> None:
    server = start_server("--api-key", KEY, "--open-metrics").wait_until_it_listens()
    assert server.client.get("/metrics").status_code == 200
    assert server.client.get("/info").status_code == 401


# The host


@pytest.mark.parametrize(
    ("listens_on", "names", "allowed", "refused"),
    [
        (
            "127.0.0.1",
            "",
            ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"],
            [
                "",
                ":8000",
                "evil.test",
                "localhost.evil.test",
                "evil.test:8000",
                "10.0.0.1",
                "[2001:db8::1]",
                "[",
                "[::1",
                "[::1]evil",
                "[::1]:80evil",
                "[::1].evil.test",
                "::1x",
            ],
        ),
        ("0.0.0.0", "", ["10.0.0.1:8000", "[2001:db8::1]", "localhost"], ["evil.test", "10.0.0.1.evil.test", ""]),
        ("box.lan", "", ["box.lan", "BOX.lan:8000"], ["evil.test"]),
        (
            "127.0.0.1",
            "moe.test, OTHER.test:8000,",
            ["moe.test:9", "other.test", "localhost"],
            ["evil.test", "", "x.moe.test"],
        ),
        ("127.0.0.1", "::1,", ["127.0.0.1"], [""]),
        ("127.0.0.1", "2001:db8::5", ["[2001:db8::5]:8000", "[2001:DB8::5]"], ["2001", "2001:8000", "[2001:db8::6]"]),
        ("127.0.0.1", "moe.test", ["moe.test.", "moe.test.:8000", "localhost."], ["moe.test..", "."]),
        ("127.0.0.1", "*", ["evil.test", "", "10.0.0.1"], []),
    ],
)
def test_a_name_that_could_be_rebound_is_allowed_by_the_flag_only(
    listens_on: str, names: str, allowed: list[str], refused: list[str]
) -> None:
    hosts = Hosts(listens_on, split_list(names))
    assert [host for host in allowed if not hosts.allow(host)] == []
    assert [host for host in refused if hosts.allow(host)] == []


@pytest.mark.parametrize("hosts", [[], ["evil.test"], ["localhost", "evil.test"], ["localhost", "localhost"]])
def test_a_request_under_another_name_is_a_421_that_names_the_flag(server: Server, hosts: list[str]) -> None:
    def get(path: str) -> httpx.Response:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
            lines = "".join(f"Host: {host}\r\n" for host in hosts)
            connection.sendall(f"GET {path} HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
            return read_response(connection)

    for path in ("/", "/info", "/docs", "/nowhere"):
        response = get(path)
        assert (response.status_code, code_of(response)) == (421, "host_not_allowed")
        assert "--allowed-hosts" in response.text
        assert "evil" not in response.text
    assert all(get(path).status_code == 200 for path in ("/livez", "/readyz", "/metrics"))


# Pages of other origins


def test_no_page_of_another_origin_may_read_anything_by_default(server: Server) -> None:
    for response in (server.client.get("/info", headers=ASKING), server.client.options("/info", headers=ASKING)):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_page_that_may_ask_reads_refusals_too(locked: Server) -> None:
    headers = ASKING | KNOWN
    connection = socket.create_connection(("127.0.0.1", locked.port), PATIENCE_S)
    content = json.dumps({"prompt": "", "max_new_tokens": FOR_EVER}).encode()
    head = HEAD + f"Authorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    connection.sendall(head + content)
    assert connection.recv(12) == b"HTTP/1.1 200"  # the only slot is taken
    answers = {
        200: locked.client.get("/info", headers=headers),
        401: locked.client.get("/info", headers=ASKING),
        404: locked.client.get("/nowhere", headers=headers),
        421: locked.client.get("/info", headers=headers | {"Host": "evil.test"}),
        422: locked.client.post("/generate", headers=headers, json={}),
        429: locked.client.post("/generate", headers=headers, json={"prompt": ""}),
    }
    connection.close()
    assert {status: answer.status_code for status, answer in answers.items()} == {status: status for status in answers}
    for answer in answers.values():
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert {"X-Request-Id", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        assert answer.headers["vary"] == "Origin"
    stranger = locked.client.get("/info", headers=KNOWN | {"Origin": "https://evil.test"})
    assert "access-control-allow-origin" not in stranger.headers


def test_a_preflight_needs_no_key_and_allows_the_headers_that_are_used(locked: Server) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    answer = locked.client.options("/generate", headers=ASKING | asked)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    allowed = set(answer.headers["access-control-allow-headers"].split(", "))
    assert allowed == {"Authorization", "Content-Type", "Last-Event-ID", "X-Request-Id"}
    assert "POST" in answer.headers["access-control-allow-methods"]
    headers = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # as OpenAI's client asks
    answer = locked.client.options("/generate", headers=ASKING | asked | headers)
    assert answer.headers["access-control-allow-headers"] == headers["Access-Control-Request-Headers"]
    stranger = locked.client.options("/generate", headers={**asked, **headers, "Origin": "https://evil.test"})
    assert "access-control-allow-headers" not in stranger.headers
    assert locked.client.options("/generate", headers=asked | {"Host": "evil.test"}).status_code == 421


def test_a_bug_s_answer_can_be_read_as_well_and_a_star_is_every_origin() -> None:
    async def buggy(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(CrossOrigin(RequestScope(buggy), origins=frozenset("*")))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/anything", headers=ASKING)

    response = asyncio.run(get())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (500, "*")


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
        content = connection.makefile("rb").read()
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


def received(connection: socket.socket) -> bytes:
    """Until the end, or until the server resets a connection on which more is being sent."""
    content = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            content += chunk
    return content


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
