"""Every answer, good or bad, has its id, its safe headers and one shape; the page's files come from one folder only."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from service.middleware import RequestScope
from tests.service.conftest import StartServer
from tests.service.serving import FOR_EVER, Server, parse_events

WARNING = '"level": "warning"'


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, once it is known to have the one shape."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/nowhere", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("GET", "/livez/", 404, "not_found"),
        ("POST", "/generate/", 404, "not_found"),
        ("DELETE", "/livez", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/%00", 404, "not_found"),
        ("GET", "/" + "x" * 5000, 404, "not_found"),
    ],
)
def test_addresses_and_methods_that_are_not_there_get_the_one_error_shape(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    response = server.client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("allow" in response.headers) == (status == 405)
    allowed = set(response.headers.get("allow", "").split(", "))
    assert ("GET" in allowed) == ("HEAD" in allowed)


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "not_json"),
        (b"", "application/json", 400, "not_json"),
        (b'{"prompt": "a"}', None, 415, "unsupported_media_type"),
        (b'{"prompt": "a"}', "text/plain", 415, "unsupported_media_type"),
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"a" * 65_536 + b'"}', "application/json", 413, "body_too_large"),
        (b'{"prompt": "' + b"a" * 8193 + b'"}', "application/json", 422, "prompt_too_long"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 422, "not_finite"),
        (b'{"prompt": "\\ud800"}', "application/json; charset=utf-8", 422, "invalid_unicode"),
        (b'{"prompt": "a", "prompt": "b"}', "application/vnd.x+json", 422, "duplicate_field"),
    ],
)
def test_bodies_that_cannot_be_answered_are_refused_and_counted(
    server: Server, content: bytes, content_type: str | None, status: int, code: str
) -> None:
    before = server.metrics().total("requests_total", outcome="rejected_invalid")
    headers = {"Content-Type": content_type} if content_type else {}
    response = server.client.post("/generate", content=content, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert server.metrics().total("requests_total", outcome="rejected_invalid") == before + 1


def test_a_body_without_a_length_is_measured_while_it_comes(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(17):
            yield b"a" * 4096

    response = server.client.post("/generate", content=endless(), headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_characters_outside_the_vocabulary_are_refused_by_place_and_code_point(server: Server) -> None:
    error = error_of(server.generate("caf\u00e9 \U0001f600"))
    assert (error["code"], error["param"]) == ("unknown_characters", "prompt")
    assert "U+00E9" in error["message"]
    assert "U+1F600" in error["message"]
    assert "caf" not in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\xa5 this is TLS, or so it says\r\n\r\n",
        b"GET / HTTP/eleven\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_what_is_not_http_gets_the_one_error_shape_and_disturbs_nobody(server: Server, sent: bytes) -> None:
    warnings = server.log.count(WARNING)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(sent)
        head, _, content = connection.makefile("rb").read().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    response = httpx.Response(
        int(first.split()[1]), headers=dict(line.split(": ", 1) for line in lines), content=content
    )
    assert (response.status_code, error_of(response)["code"]) == (400, "bad_request")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert server.client.get("/livez").status_code == 200
    assert server.log.count(WARNING) == warnings


def test_a_wish_to_upgrade_is_ignored_without_a_word(server: Server) -> None:
    warnings = server.log.count(WARNING)
    wish = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert server.client.get("/livez", headers=wish).status_code == 200
    assert server.log.count(WARNING) == warnings


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/info", "/metrics", "/", "/nowhere"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    get, head = server.client.get(path), server.client.head(path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    assert head.content == b""


FIELDS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(-1, 3), "stream": st.booleans()},
    optional={
        "prompt": st.text(max_size=20) | st.sampled_from(["", "ROMEO:"]),
        "temperature": st.floats() | st.integers(),
        "top_k": st.integers(),
        "top_p": st.floats(0, 1.5),
        "seed": st.integers(),
        "return_routed_experts": st.booleans() | st.none(),
        "unknown_characters": st.sampled_from(["refuse", "fold", "", None]),
        "unknown": st.none(),
    },
)


@given(FIELDS)
def test_any_combination_of_fields_is_answered_or_refused_and_never_breaks_it(
    server: Server, fields: dict[str, Any]
) -> None:
    content = json.dumps(fields, ensure_ascii=True)
    response = server.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 422), response.text
    if response.status_code == 422:
        error_of(response)
    elif fields["stream"]:
        assert parse_events(response.iter_lines())[-1][0] == "done"
    else:
        assert response.json()["usage"]["generated_tokens"] == fields["max_new_tokens"]


def test_a_bug_of_ours_is_a_500_with_an_id_and_without_a_traceback() -> None:
    async def buggy(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError("a secret of ours")

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(RequestScope(buggy))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/anything")

    response = asyncio.run(get())
    assert (response.status_code, error_of(response)["code"]) == (500, "internal")
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/", "/info", "/metrics", "/nowhere", "/openapi.json"])
def test_every_answer_carries_the_page_s_policy_and_an_id_of_ours(server: Server, path: str) -> None:
    headers = server.client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"
    assert len(headers["x-request-id"]) == 16
    assert "server" not in headers


def test_a_client_s_id_comes_back_beside_ours_bounded_and_clean(server: Server) -> None:
    theirs = b"job-7\xff <script> " + b"x" * 500
    headers = server.client.get("/livez", headers={b"X-Request-Id": theirs}).headers
    assert headers["x-request-id"] != headers["x-client-request-id"]
    assert headers["x-client-request-id"].startswith("job-7scriptxxx")
    assert len(headers["x-client-request-id"]) <= 128


def test_the_page_and_its_files_have_their_types(server: Server) -> None:
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert server.client.get("/style.css").headers["content-type"].startswith("text/css")
    assert "javascript" in server.client.get("/app.js").headers["content-type"]
    assert server.client.head("/").status_code == 200


def test_nobody_is_sent_to_the_address_that_the_host_header_names(start_server: StartServer) -> None:
    server = start_server("--allowed-hosts", "elsewhere.test").wait_until_it_listens()
    for path in ("/.", "//elsewhere.test/..", "/livez/", "//elsewhere.test/livez/"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: elsewhere.test\r\nConnection: close\r\n\r\n".encode())
            head = connection.makefile("rb").read().partition(b"\r\n\r\n")[0].lower()
        assert b"location:" not in head
        assert b" 421 " not in head


@pytest.mark.parametrize("path", ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "//etc/passwd", "/static/../app.py"])
def test_files_outside_the_page_are_not_served(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # httpx would tidy the path up
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] == b"404"


def test_info_says_what_is_served_and_within_which_limits(server: Server) -> None:
    info = server.client.get("/info").json()
    assert info["model"]["name"] == "tiny"
    assert info["model"]["parameters"] > info["model"]["active_parameters"] > 0
    assert len(info["vocabulary"]) == 65
    assert info["limits"] == {"prompt_characters": 8192, "max_new_tokens": FOR_EVER, "timeout_s": 300}
    assert info["defaults"] == {"max_new_tokens": 256, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert info["batch_invariance"] == {"holds": True, "row_multiple": 4}
    assert (info["phase"], info["slots"], info["threads"]) == ("ready", 4, 1)
    assert info["runner"] in ("native", "torch")
    assert all((info["device"], info["versions"]["torch"]))
    assert len(info["checkpoint"]) == 12


def test_the_probes_say_so_when_it_is_ready(server: Server) -> None:
    for path in ("/livez", "/readyz"):
        response = server.client.get(path)
        assert response.status_code == 200
        assert response.json()["phase"] == "ready"


def test_the_schema_describes_the_body_and_the_one_error_shape(server: Server) -> None:
    schema = server.client.get("/openapi.json").json()
    operation = schema["paths"]["/generate"]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(fields) >= {"prompt", "max_new_tokens", "temperature", "seed", "stream"}
    assert "ErrorBody" in json.dumps(operation["responses"]["422"])
    assert "HTTPValidationError" not in json.dumps(schema)


def test_prompts_and_tracebacks_never_reach_the_log(server: Server) -> None:
    server.answer("O happy dagger", max_new_tokens=3)
    server.generate("O happy dagger \u2205")
    assert "dagger" not in server.log
    assert "Traceback" not in server.log
    assert all(json.loads(line)["event"] for line in server.log.splitlines())
