"""Whatever is sent, nothing breaks, nothing hangs and nobody else notices.

First what /openapi.json says may and may not be sent, then bytes that no library would write.
"""

import gzip
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig
from schemathesis.core.result import Ok
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.checkpoints import CHARACTERS, TINY
from tests.evidence import At, Evidence
from tests.service.raw import received
from tests.service.serving import Event, Server, parse_events

Operation = APIOperation[Any, Any, Any, Any]
AnyCase = schemathesis.Case[Any]

PATIENCE_S = 10.0
MAX_NEW_TOKENS = 8
MAX_BODY_BYTES = 65_536
ALL_SORTS = settings(deadline=None, suppress_health_check=list(HealthCheck))


class Beside:
    """Somebody who asks for the same text again and again, and must get it to the last bit whatever others do."""

    def __init__(self, server: Server, **body: object) -> None:
        self._server = server
        self._body: dict[str, Any] = {"seed": 5, "logprobs": 10, "return_routed_experts": True, **body}
        self._alone = self._events()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat)
        self._failure: Exception | None = None
        self.streams = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream beside hangs"
        if self._failure:
            raise self._failure
        assert self.streams > 0

    def _repeat(self) -> None:
        try:
            while self.streams == 0 or not self._is_over.is_set():
                assert self._events() == self._alone, "the stream beside has changed"
                self.streams += 1
        except Exception as failure:
            self._failure = failure

    def _events(self) -> list[Event]:
        """All but what is never twice the same: the request's id and its timings."""
        events = self._server.events(**self._body)
        return [(name, {key: data[key] for key in data if key not in ("id", "timings")}) for name, data in events]


def is_sound(server: Server) -> bool:
    """It answers, all slots are free again, and no bug of ours is in the log."""
    server.wait_for(requests_running=0, requests_queued=0)
    assert "Traceback" not in server.log
    assert '"level": "error"' not in server.log
    return server.client.get("/readyz").status_code == 200


@pytest.fixture(scope="module")
def brief(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that writes a few tokens at most, so that whoever asks for the most gets them soon."""
    log = tmp_path_factory.mktemp("fuzz") / "log"
    flags = ("--checkpoint", checkpoint, "--slots", 4, "--threads", 1, "--max-new-tokens", MAX_NEW_TOKENS)
    server = Server(log, *flags)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


# What the document says


def test_the_document_and_the_server_agree_on_what_may_be_sent(brief: Server, at: At, evidence: Evidence) -> None:
    document = schemathesis.openapi.from_url(f"{brief.url}/openapi.json")
    fingerprint = brief.client.get("/info").json()["fingerprint"]
    operations = [result.ok() for result in document.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) == sum(map(len, brief.client.get("/openapi.json").json()["paths"].values()))
    statuses: Counter[int] = Counter()

    def judge(case: AnyCase) -> None:
        if is_meant_to_be_right(case):
            make_possible(case, fingerprint)
        response = case.call(timeout=PATIENCE_S)
        statuses[response.status_code] += 1
        case.validate_response(response, excluded_checks=beyond_the_document(case, response))

    with Beside(brief, max_new_tokens=MAX_NEW_TOKENS) as beside:
        for operation in operations:
            for case in edges_of(operation):
                judge(case)
        with_body = [operation for operation in operations if operation.body]
        for mode in GenerationMode:
            any_case = st.one_of([operation.as_strategy(generation_mode=mode) for operation in with_body])
            settings(ALL_SORTS, max_examples=at(30, 1250))(given(any_case)(judge))()
    assert is_sound(brief)
    assert {200, 422} <= set(statuses)
    evidence("requests made from /openapi.json", statuses.total())
    evidence("accepted", statuses[200])
    evidence("answered with 5xx", sum(statuses[status] for status in statuses if status >= 500))
    evidence("streams beside, bitwise the same", beside.streams)


def edges_of(operation: Operation) -> Iterator[AnyCase]:
    """Every limit of every field, on it and beyond it; other methods, other media types."""
    yield from CoverageGenerator(
        operation=operation,
        generation_modes=list(GenerationMode),
        generation_config=GenerationConfig(),
        auth_storage=None,
        override=Override(),
        feedback=NO_FEEDBACK,
    )


def is_meant_to_be_right(case: AnyCase) -> bool:
    return case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE


def make_possible(case: AnyCase, fingerprint: str) -> None:
    """What JSON Schema cannot say: 1.0 is no integer, there is one model, a stream goes on where it could have been."""
    body: Any = as_javascript_writes(case.body)
    if isinstance(body, dict):
        case.body = {**body, "model": "tiny"} if "model" in body else body
    event_id = case.headers.pop("Last-Event-ID", None)
    if event_id is not None and isinstance(body, dict) and can_go_on(body):
        case.headers["Last-Event-ID"] = f"{fingerprint}:0"


def can_go_on(body: dict[str, Any]) -> bool:
    return body.get("seed") is not None and body.get("stream") is not False and body.get("max_new_tokens") != 1


def as_javascript_writes(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_javascript_writes(member) for name, member in value.items()}
    if isinstance(value, list):
        return [as_javascript_writes(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def beyond_the_document(case: AnyCase, response: Any) -> list[Any]:
    """The checks that a refusal is excused from: those which depend on vocabulary, experts and the machine's speed."""
    body: Any = case.body
    if response.status_code == 413 and len(response.request.body) > MAX_BODY_BYTES:  # 8,192 characters, each escaped
        return [positive_data_acceptance, negative_data_rejection]
    if not isinstance(body, dict) or response.status_code not in (422, 504):
        return []
    error = response.json()["error"]
    if error["code"] == "unknown_characters" and body.get("unknown_characters") != "fold":
        return [positive_data_acceptance]
    if error["param"] == "disabled_experts" and "must leave at least" in error["message"]:
        return [positive_data_acceptance]
    if error["code"] in ("timeout", "queue_timeout") and (body.get("timeout_s") or PATIENCE_S) < PATIENCE_S:
        return [not_a_server_error]
    return []


# What no document says


@dataclass(frozen=True)
class Sent:
    """Bytes of one request. Who is not whole waits for nothing and leaves; who is clean has to be served."""

    content: bytes
    headers: tuple[bytes, ...] = ()
    is_whole: bool = True
    is_clean: bool = False

    @property
    def bytes(self) -> bytes:
        named = b"\r\n".join(self.headers).lower()
        own = [b"Host: localhost", b"Connection: close"]
        if b"content-type:" not in named:
            own.append(b"Content-Type: application/json")
        if b"transfer-encoding:" not in named and b"content-length:" not in named:
            own.append(b"Content-Length: %d" % len(self.content))
        return b"\r\n".join([b"POST /generate HTTP/1.1", *own, *self.headers, b"", self.content])


GOOD = {
    "prompt": st.text(CHARACTERS, max_size=200),
    "max_new_tokens": st.integers(1, MAX_NEW_TOKENS),
    "temperature": st.sampled_from([0, -0.0, 0.01, 1, 2]) | st.floats(0.01, 2),
    "top_k": st.integers(0, len(CHARACTERS)),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "stop": st.lists(
        st.sampled_from(CHARACTERS) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64),
        max_size=4,
    ),
    "logprobs": st.integers(0, 10),
    "disabled_experts": st.lists(
        st.tuples(st.integers(0, TINY["num_layers"] - 1), st.integers(0, TINY["num_experts"] - 1)), max_size=2
    ),
    "timeout_s": st.floats(PATIENCE_S, 300),
    "stream": st.booleans(),
    "return_routed_experts": st.booleans(),
    "unknown_characters": st.sampled_from(["refuse", "fold"]),
}
ODD_VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "-0.0", "0", "1", "1.0", "1e3", "0.009"),
    *("2.1", "-1", "9223372036854775808", "9" * 5000, "-" + "9" * 40, "1" + "0" * 400 + ".5", "01", "1.", ".5", "+1"),
    *("0x1", "null", "true", "false", "True", "None", "undefined", "", "[]", "{}", "[[]]", "[0,]", '[""]', "[null]"),
    *("[[0]]", "[[0,0],[0,1],[0,2]]", "[[9,0]]", "[[0,-1]]", "[[0,0,0]]", '[["0","0"]]', "[[1e400,0]]"),
    *('{"a":1,"a":2}', '""', '"12"', '"true"', '"\\u0000"', '"\0"', '"\\ud800"', '"\\udc00\\ud800"', '"\ud800"'),
    *('"\\x"', "'a'", '"', '"\n"', '"\u00e9"', '"\U0001f600"', '"\ufdd0\uffff"', '"\u202e\u2028"'),
    *('"' + "a" * 8193 + '"', '"' + "\U0001f600" * 8192 + '"', f'["{"a" * 65}"]', '["\\ud800"]'),
    *('["a","b","c","d","e"]', "[" * 9000, "[" * 500 + "]" * 500, "/**/1", "1 // x"),
]
ODD_NAMES = ["", "prompt\0", "\\u0070rompt", "Prompt", "__proto__", "\\ud800", "\ud800", "n", "echo", "a" * 9000]
ODD_BODIES = [
    *(b"", b" ", b"null", b"[]", b'"prompt"', b"0", b"NaN", b"{}{}", b'{"prompt":""}x', b'{"prompt":""}\0'),
    *(b"\0" * 100, b"[" * 100_000, b'{"a":' * 100_000, b"[" * 60_000, b'{"a":' * 13_000, b"[" * 30_000 + b"]" * 30_000),
    *(b" " * 65_537, b'{"prompt":""}' + b" " * 65_523, b'{"prompt":""}' + b" " * 65_524, b'"' + b"\\" * 60_000),
    *(b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"prompt=a"),
    b"1" * 65_536,
]
ODD_HEADERS = [
    *(b"Content-Type:", b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16"),
    *(b"Content-Type: application/x+json", b"Content-Type: application/", b"Content-Type: \xff/\x80"),
    *(b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Accept: \xff", b"Accept: application/xml;q=NaN"),
    *(b"Last-Event-ID:", b"Last-Event-ID: \xff", b"Last-Event-ID: 0123456789ab:1", b"Last-Event-ID: 0123456789ab:-2"),
    *(b"Last-Event-ID: 0123456789ab:" + b"9" * 5000, b"Last-Event-ID: 0123456789ab:1\xb2", b"Range: bytes=0-"),
    *(b"X-Request-Id: \xff\x01", b"Expect: 100-continue", b"Upgrade: h2c", b"Cookie: " + b"a" * 4000),
    *(b"Origin: null", b"Authorization: Bearer \xff", b"TE: trailers", b"X-Forwarded-For: \x80", b"a: b\r\n c"),
    *(b": a", b"\xff: a", b"a\0: b"),
]
CHUNKED = b"Transfer-Encoding: chunked"
CHUNK_ENDS = [b"", b"5\r\n", b"ffffffffffffffff\r\n", b"zz\r\n", b"0\r\nX: "]


def members(fields: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in fields.items()]


def spelt(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"


def good_fields() -> st.SearchStrategy[dict[str, Any]]:
    required = {name: GOOD[name] for name in ("prompt", "max_new_tokens", "seed")}
    return st.fixed_dictionaries(
        required, optional={name: value | st.none() for name, value in GOOD.items() if name not in required}
    )


@st.composite
def odd_members(draw: st.DrawFn) -> str:
    """A good body in which a value or two are strange, or given twice, or under a strange name."""
    pairs = members(draw(good_fields()))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([*GOOD, *GOOD, *ODD_NAMES]))
        pairs = [pair for pair in pairs if pair[0] != name or draw(st.booleans())]
        pairs.append((name, draw(st.sampled_from(ODD_VALUES))))
    return spelt(pairs)


@st.composite
def odd_encodings(draw: st.DrawFn) -> bytes:
    """A good body in another encoding, or with a part of it missing or damaged."""
    content = spelt(members(draw(good_fields())))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]))
    coded = content.encode(encoding)
    start, end = sorted((draw(st.integers(0, len(coded))), draw(st.integers(0, len(coded)))))
    return coded[:start] + draw(st.binary(max_size=4)) + coded[min(end, start + 4) :]


def chunked(content: bytes, size: int, end: bytes) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def whole_chunks(content: bytes, size: int) -> Sent:
    return Sent(chunked(content, size, b"0\r\n\r\n"), (CHUNKED,))


@st.composite
def unfinished(draw: st.DrawFn) -> Sent:
    """A request that promises more than it sends, or never says that it is over."""
    content = spelt(members(draw(good_fields()))).encode()
    if draw(st.booleans()):
        length = draw(st.sampled_from([len(content) + 1, 65_536]))
        return Sent(content, (b"Content-Length: %d" % length,), is_whole=False)
    return Sent(chunked(content, 7, draw(st.sampled_from(CHUNK_ENDS))), (CHUNKED,), is_whole=False)


CLEAN = good_fields().map(lambda fields: Sent(spelt(members(fields)).encode(), is_clean=True))
ANYTHING = st.one_of(
    CLEAN,
    odd_members().map(lambda content: Sent(content.encode("utf-8", "surrogatepass"))),
    odd_members().map(lambda content: Sent(content.encode("utf-8", "surrogatepass"))),
    odd_encodings().map(Sent),
    st.sampled_from(ODD_BODIES).map(Sent),
    st.builds(
        lambda clean, headers: Sent(clean.content, tuple(headers)),
        CLEAN,
        st.lists(st.sampled_from(ODD_HEADERS), min_size=1, max_size=3),
    ),
    CLEAN.map(lambda clean: Sent(gzip.compress(clean.content, mtime=0), (b"Content-Encoding: gzip",))),
    st.builds(lambda clean, size: whole_chunks(clean.content, size), CLEAN, st.integers(1, 500)),
    st.builds(whole_chunks, st.sampled_from(ODD_BODIES), st.just(4096)),
    unfinished(),
    st.just(Sent(chunked(b"a" * 200_000, 4096, b""), (CHUNKED,))),  # goes on for ever, and is a 413 long before
)


def one_of_each() -> Iterator[Sent]:
    """Every oddity once, alone in what is otherwise good; chance is for their company."""
    good = {"prompt": "ROMEO:", "max_new_tokens": MAX_NEW_TOKENS, "seed": 1}
    content = spelt(members(good)).encode()
    yield from (Sent(body) for body in ODD_BODIES)
    yield from (Sent(content, (header,)) for header in ODD_HEADERS)
    yield from (Sent(chunked(content, 7, end), (CHUNKED,), is_whole=False) for end in CHUNK_ENDS)
    for number, value in enumerate(ODD_VALUES):
        for name in ("prompt", list(GOOD)[number % len(GOOD)]):
            others = members({key: good[key] for key in good if key != name})
            yield Sent(spelt([*others, (name, value)]).encode("utf-8", "surrogatepass"))
    yield from (Sent(spelt([*members(good), (name, "1")]).encode("utf-8", "surrogatepass")) for name in ODD_NAMES)


def test_bytes_that_no_library_would_write_break_nothing(server: Server, at: At, evidence: Evidence) -> None:
    document = server.client.get("/openapi.json").json()
    known = {int(status) for status in document["paths"]["/generate"]["post"]["responses"]} - {500, 503}
    statuses: Counter[int | str] = Counter()

    def judge(sent: Sent) -> None:
        response = exchange(server, sent)
        if response is None:
            statuses["left"] += 1
            return
        statuses[response.status_code] += 1
        assert response.status_code in known
        assert is_answer(response)
        assert response.status_code == 200 or not sent.is_clean

    with Beside(server, max_new_tokens=400) as beside:
        for sent in one_of_each():
            judge(sent)
        settings(ALL_SORTS, max_examples=at(100, 2500))(given(ANYTHING)(judge))()
    assert is_sound(server)
    assert {200, 400, 413, 422, "left"} <= set(statuses)
    evidence("requests of odd bytes", statuses.total())
    evidence("accepted", statuses[200])
    evidence("answered with 500", statuses[500])
    evidence("streams of 400 tokens beside, bitwise the same", beside.streams)


def exchange(server: Server, sent: Sent) -> httpx.Response | None:
    """The answer, if the client waits for one; socket.timeout when it does not come."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        with suppress(ConnectionError):  # who is refused early may be cut off while it still sends
            connection.sendall(sent.bytes)
        if not sent.is_whole:
            return None
        head, _, content = received(connection).partition(b"\r\n\r\n")
    if head == b"HTTP/1.1 100 Continue":
        head, _, content = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    if ("transfer-encoding", "chunked") in headers:
        content = unchunked(content)
    return httpx.Response(int(first.split()[1]), headers=headers, content=content)


def unchunked(content: bytes) -> bytes:
    whole = b""
    while content:
        size, _, rest = content.partition(b"\r\n")
        whole, content = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole


def is_answer(response: httpx.Response) -> bool:
    """A stream with its end, a whole answer, or the one shape of a refusal."""
    if response.headers["content-type"].startswith("text/event-stream"):
        return parse_events(response.text.split("\n"))[-1][0] == "done"
    told: dict[str, Any] = response.json()
    if response.status_code == 200:
        return "text" in told
    assert told["error"]["request_id"] == response.headers["x-request-id"]
    return set(told["error"]) == {"type", "code", "message", "param", "request_id"}
