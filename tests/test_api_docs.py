"""docs/api.md: every example prints what the page shows, and the tables say all that the code does, and no more."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from service.answers import Experts, Info, LayerExperts
from service.errors import KINDS
from service.metrics import MAX_EXPERT_SERIES, OUTCOMES, ExpertDetail
from service.openai import CompletionBody
from service.reference import EVENTS
from service.schemas import GenerateBody
from service.settings import Settings
from tests.examples import PATIENCE_S, ROOT, Example, examples_of
from tests.service.serving import Server, parse_events

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
EXAMPLES = examples_of(ROOT / "docs" / "api.md")
OPEN_ENDED = [example for example in EXAMPLES if example.output is None]


def table(first_header: str, after: str = "") -> dict[str, list[str]]:
    """The cells of the rows below this header, by what their first cell has in backquotes."""
    text = PAGE[PAGE.index(after) :]
    rows = text[re.search(rf"^\| {first_header} \|", text, re.MULTILINE).start() :].split("\n\n")[0].splitlines()[2:]  # type: ignore[union-attr]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: each for each in cells for name in re.findall(r"`([^`]+)`", each[0])}


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) >= 10
    assert PAGE.count("\n```output\n") == len(EXAMPLES) - len(OPEN_ENDED)


def test_info_has_the_fields_of_the_page() -> None:
    assert set(table("in the answer", after="## The server\n")) == set(Info.model_fields)


def test_operations_name_every_setting_metric_and_outcome(shipped: Server) -> None:
    rows = OPERATIONS.split("| setting | default | meaning |\n")[1].split("\n\n")[0].splitlines()
    named = {setting for row in rows for setting in re.findall(r"`--([a-z-]+)`", row.split("|")[1])}
    assert named == {name.replace("_", "-") for name in Settings.model_fields}
    metrics = set(re.findall(r"^# TYPE (moescope_\w+)", shipped.client.get("/metrics").text, re.MULTILINE))
    assert len(metrics) > 20
    assert not {name for name in metrics if f"`{name}" not in PAGE + OPERATIONS}
    assert not {outcome for outcome in OUTCOMES if f"`{outcome}`" not in OPERATIONS}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_an_example_prints_what_the_page_shows(shipped: Server, example: Example) -> None:
    printed = example.run(shipped.port)
    if example.output is None:
        assert len(printed) == 100  # the tokens that it asks for
    else:
        assert example.shows(printed), printed


def test_the_client_of_the_page_goes_on_after_its_connection_broke(shipped: Server) -> None:
    (client,) = OPEN_ENDED
    seeded = Example(
        client.line, client.language, client.code.replace('"ROMEO:\\n", ', '"ROMEO:\\n", "seed": 7, '), None
    )
    with proxy_that_breaks(shipped.port, after_bytes=[700, 2000, 2001]) as (port, connections):
        printed = seeded.run(port)
    assert len(connections) == 4
    assert printed == seeded.run(shipped.port)


@contextmanager
def proxy_that_breaks(upstream: int, after_bytes: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Its port, and how much of each answer it let through; it cuts the first ones after so many bytes."""
    let_through: list[int] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            with suppress(OSError):  # the listener is closed
                while True:
                    client, _ = listener.accept()
                    most = after_bytes[len(let_through)] if len(let_through) < len(after_bytes) else 10**9
                    with client, socket.create_connection(("127.0.0.1", upstream), PATIENCE_S) as server:
                        server.sendall(whole_request(client))
                        let_through.append(relay(server, client, most))

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], let_through
        listener.shutdown(socket.SHUT_RDWR)


def whole_request(client: socket.socket) -> bytes:
    content = b""
    while b"\r\n\r\n" not in content:
        content += client.recv(65_536)
    head, _, body = content.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += client.recv(65_536)
    return head + b"\r\n\r\n" + body


def relay(server: socket.socket, client: socket.socket, most: int) -> int:
    count = 0
    while count < most and (piece := server.recv(min(512, most - count))):
        client.sendall(piece)
        count += len(piece)
    return count


def test_the_fields_of_generate_are_those_of_the_code(shipped: Server) -> None:
    told = table("field")
    assert list(told) == list(GenerateBody.model_fields)
    assert {name: cells[2] for name, cells in told.items()} == defaults_of(GenerateBody)
    document = shipped.client.get("/openapi.json").json()
    schema = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    told["top_k"][3] += " 65"  # which is told in words
    bounds = [(name, f"{bound:,}") for name, field in schema["properties"].items() for bound in bounds_of(field)]
    assert len(bounds) > 15
    assert [(name, bound) for name, bound in bounds if bound not in told[name][3]] == []


def defaults_of(body: type[BaseModel]) -> dict[str, str]:
    """As JSON, by the names on the wire."""
    fields = {field.alias or name: field for name, field in body.model_fields.items()}
    return {
        name: "required" if field.is_required() else f"`{json.dumps(field.default)}`" for name, field in fields.items()
    }


def bounds_of(field: dict[str, Any]) -> list[float]:
    kinds = [field, *field.get("anyOf", [])]
    kinds += [kind["items"] for kind in kinds if "prefixItems" not in kind.get("items", {"prefixItems": []})]
    return [
        kind[bound] for kind in kinds for bound in ("minimum", "maximum", "minLength", "maxLength") if bound in kind
    ]


def test_the_fields_of_openai_s_dialect_are_those_of_the_code() -> None:
    told = table("field", after="## OpenAI's clients")
    ours = GenerateBody.model_fields.keys() - {"max_new_tokens"}
    defaults = defaults_of(CompletionBody)
    assert set(told) == set(defaults) - (ours - told.keys())
    assert {name: float_or_text(cells[2]) for name, cells in told.items()} == {
        name: float_or_text(defaults[name]) for name in told
    }


def float_or_text(default: str) -> float | str:
    return float(default.strip("`")) if re.fullmatch(r"`[0-9.]+`", default) else default


def test_the_errors_are_those_of_the_code() -> None:
    told = {code: (int(cells[1]), cells[2].strip("`"), cells[3]) for code, cells in table("code").items()}
    assert told == {code: (kind.status, kind.type, wait_of(code)) for code, kind in KINDS.items()}


def test_the_details_of_expert_metrics_are_those_of_the_code() -> None:
    assert tuple(table("detail")) == get_args(ExpertDetail)
    assert {*table("detail"), "auto"} == {*get_args(Settings.model_fields["expert_metrics"].annotation)}
    assert f"`full` up to {MAX_EXPERT_SERIES:,} series" in PAGE


def test_the_fields_of_experts_are_those_of_the_code() -> None:
    told = table("in the answer")
    for kind, place in ((Experts, "whole"), (LayerExperts, "each layer")):
        assert {name for name, cells in told.items() if place in cells[1]} == set(kind.model_fields)


def wait_of(code: str) -> str:
    seconds = KINDS[code].retry_after_s
    return "1 to 60" if code == "queue_full" else "" if seconds is None else str(seconds)


def test_the_routes_and_events_are_those_of_the_document(shipped: Server) -> None:
    document = shipped.client.get("/openapi.json").json()
    there = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert there | {"GET /openapi.json", "GET /", "GET /docs"} == set(table("route"))
    item = EVENTS["itemSchema"]
    assert set(item["properties"]["event"]["enum"]) == set(table("event"))  # type: ignore[index]


def test_a_stream_has_the_fields_that_the_page_tells(shipped: Server) -> None:
    wish = {"prompt": "\u00e9a", "unknown_characters": "fold", "logprobs": 1, "return_routed_experts": True}
    response = shipped.client.post("/generate", json={**wish, "max_new_tokens": 2})
    for event, data in parse_events(response.iter_lines()):
        named = {name.partition(".")[0] for name in re.findall(r"`([^`]+)`", table("event")[event][2])}
        assert set(data) == named


@pytest.mark.parametrize("path", ["/", "/docs", "/info", "/experts", "/livez", "/readyz", "/metrics", "/openapi.json"])
def test_head_works_where_get_does(shipped: Server, path: str) -> None:
    assert shipped.client.head(path).status_code == 200


def test_every_link_on_the_page_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert links
    assert links <= headings
