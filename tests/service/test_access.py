"""Who may ask: with the key, under a name of the server's own, from a page of an allowed origin."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.guard import CrossOrigin, Hosts, split_list
from service.middleware import RequestScope
from service.settings import read_settings
from tests.service.conftest import StartServer
from tests.service.raw import HEAD, code_of, read_response
from tests.service.serving import FOR_EVER, PATIENCE_S, Server, run_to_the_end

KEY = "not-for-the-log"
ORIGIN = "https://pages.test"
ASKING = {"Origin": ORIGIN}
KNOWN = {"Authorization": f"Bearer {KEY}"}


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
