"""Text to tokens and back over HTTP; bodies are read as strictly as those of /generate, and no engine is needed."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.app import create_app
from service.settings import read_settings
from tests.checkpoints import CHARACTERS
from tests.service.serving import Server

VOCABULARY = sorted(CHARACTERS)
IDS = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=50)


def post(server: Server, path: str, **sent: object) -> httpx.Response:
    return server.client.post(path, json=sent)


@given(IDS)
def test_tokens_and_text_turn_into_each_other(server: Server, ids: list[int]) -> None:
    text = post(server, "/detokenize", tokens=ids).json()["prompt"]
    assert text == "".join(VOCABULARY[token_id] for token_id in ids)
    assert post(server, "/tokenize", prompt=text).json() == {"count": len(ids), "tokens": ids}


def test_tokenize_folds_when_asked_and_refuses_by_place_else(server: Server) -> None:
    folded = post(server, "/tokenize", prompt="Caf\u00e9", unknown_characters="fold").json()
    assert folded == {"count": 4, "tokens": [VOCABULARY.index(each) for each in "Cafe"], "prompt_used": "Cafe"}
    error = post(server, "/tokenize", prompt="Caf\u00e9").json()["error"]
    assert (error["code"], error["param"]) == ("unknown_characters", "prompt")
    assert "U+00E9 at 3" in error["message"]


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        ("/tokenize", "{", 400, "not_json"),
        ("/tokenize", "{}", 422, "missing_field"),
        ("/tokenize", '{"prompt": ["a"]}', 422, "wrong_type"),
        ("/tokenize", '{"prompt": "\\ud800"}', 422, "invalid_unicode"),
        ("/tokenize", '{"prompt": "", "prompt": ""}', 422, "duplicate_field"),
        ("/tokenize", '{"prompt": "", "max_new_tokens": 1}', 422, "unknown_field"),
        ("/tokenize", json.dumps({"prompt": "a" * 8193}), 422, "prompt_too_long"),
        ("/detokenize", '{"tokens": null}', 422, "missing_field"),
        ("/detokenize", '{"tokens": "a"}', 422, "wrong_type"),
        ("/detokenize", '{"tokens": [true]}', 422, "wrong_type"),
        ("/detokenize", '{"tokens": [NaN]}', 422, "wrong_type"),
        ("/detokenize", '{"tokens": [65]}', 422, "out_of_range"),
        ("/detokenize", '{"tokens": [-1]}', 422, "out_of_range"),
        ("/detokenize", json.dumps({"tokens": [0] * 8193}), 422, "out_of_range"),
        ("/v1/completions", '{"model": "tiny", "prompt": "", "n": 1, "n": 1}', 422, "duplicate_field"),
        ("/v1/completions", '{"model": "tiny", "prompt": "\\u2205"}', 422, "unknown_characters"),
    ],
)
def test_bodies_are_read_as_strictly_as_those_of_generate(
    server: Server, path: str, content: str, status: int, code: str
) -> None:
    response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_tokens_need_no_engine_and_completions_say_that_it_is_loading(checkpoint: Path) -> None:
    app = create_app(read_settings(["--checkpoint", str(checkpoint)]))  # its lifespan, and so the engine, never starts

    async def ask_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [
                await client.post("/tokenize", json={"prompt": "ab"}),
                await client.post("/detokenize", json={"tokens": [0]}),
                await client.get("/v1/models"),
                await client.post("/v1/completions", json={"model": "tiny", "prompt": ""}),
            ]

    *works, completion = asyncio.run(ask_all())
    assert [response.status_code for response in works] == [200, 200, 200]
    assert (completion.status_code, completion.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in completion.headers
