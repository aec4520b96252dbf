"""Bytes and byte pairs over the wire: random weights write garbage, and every way of asking agrees on its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from model.tokenizer import Tokenizer
from tests.checkpoints import tiny_checkpoint
from tests.service.serving import Event, Server, parse_events

TEXT = "caf\u00e9 na\u00efve \u20ac \u2014 the theatre, the thesis \U0001f642\n" * 20
TOKENIZERS = {"byte": Tokenizer.of_bytes(), "bpe": Tokenizer.of_bpe(TEXT, 300)}
PROMPT = "caf\u00e9 \U0001f642"
SEEDS = range(8)


@dataclass(frozen=True)
class Served:
    tokenizer: Tokenizer
    server: Server


@pytest.fixture(scope="module", params=TOKENIZERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("bytes")
    tokenizer = TOKENIZERS[request.param]
    tiny_checkpoint(folder / "tiny", tokenizer=tokenizer)
    server = Server(folder / "log", "--checkpoint", folder / "tiny", "--slots", 2, "--threads", 1)
    try:
        yield Served(tokenizer, server.wait_until_ready())
    finally:
        server.stop()


def tokens_of(events: list[Event]) -> list[dict[str, Any]]:
    return [data for name, data in events if name == "token"]


def text_of(tokens: list[dict[str, Any]]) -> str:
    return "".join(token["text"] for token in tokens)


def test_joined_texts_are_the_answer_and_what_the_ids_decode_to(served: Served) -> None:
    endings = set()
    for seed in SEEDS:
        asked = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
        events = served.server.events(PROMPT, **asked)
        tokens = tokens_of(events)
        whole = served.tokenizer.decode(token["token_id"] for token in tokens)
        assert text_of(tokens) == events[-1][1]["text"] == served.server.answer(PROMPT, **asked)["text"] == whole
        last = served.tokenizer.token_bytes[tokens[-1]["token_id"]]
        endings.add(0xC2 <= last[-1] <= 0xF4)
    assert endings == {True, False}, "some end inside a character"


def test_an_unfinished_character_is_told_by_the_last_token(served: Served) -> None:
    for seed in SEEDS:
        tokens = tokens_of(served.server.events(PROMPT, max_new_tokens=20, temperature=1.0, seed=seed))
        spell = served.tokenizer.speller()
        told = [spell(token["token_id"]) for token in tokens]
        assert [token["text"] for token in tokens] == [*told[:-1], told[-1] + spell.finish()]


def test_a_stop_string_cuts_the_text_wherever_its_bytes_lie(served: Served) -> None:
    for seed in SEEDS:
        asked = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed}
        whole: str = served.server.answer(PROMPT, **asked)["text"]
        stop = next((each for each in whole[3:] if each not in "\ufffd\0"), "e")
        events = served.server.events(PROMPT, **asked, stop=[stop])
        assert text_of(tokens_of(events)) == events[-1][1]["text"] == whole.split(stop)[0]
        assert served.server.answer(PROMPT, **asked, stop=[stop])["text"] == whole.split(stop)[0]
        assert events[-1][1]["finish_reason"] == ("stop" if stop in whole else "length")


def test_a_resumed_stream_goes_on_inside_a_character(served: Served) -> None:
    asked = {"prompt": PROMPT, "max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    lines = served.server.client.post("/generate", json=asked).text.splitlines()
    tokens = tokens_of(parse_events(lines))
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    for index in range(len(tokens) - 1):
        (event_id,) = {each for each in ids if each.endswith(f":{index}")}
        resumed = served.server.client.post("/generate", json=asked, headers={"Last-Event-ID": event_id})
        assert tokens_of(parse_events(resumed.text.splitlines())) == tokens[index + 1 :]


def test_alternatives_are_shown_by_id_and_detokenize_takes_any_ids(served: Served) -> None:
    answer = served.server.answer(PROMPT, max_new_tokens=20, temperature=1.0, seed=1, logprobs=10)
    vocabulary = served.server.client.get("/info").json()["vocabulary"]
    assert vocabulary == served.tokenizer.tokens
    for token in answer["tokens"]:
        assert all(each["text"] == vocabulary[each["token_id"]] for each in token["top_logprobs"])
    ids = [token["token_id"] for token in answer["tokens"]]
    assert served.server.client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == answer["text"]
    told = served.server.client.post("/tokenize", json={"prompt": PROMPT, "unknown_characters": "fold"}).json()
    assert (told["tokens"], told["prompt_used"]) == (served.tokenizer.encode(PROMPT), PROMPT)


def test_openai_s_client_gets_the_same_text(served: Served) -> None:
    client = OpenAI(base_url=f"{served.server.url}/v1", api_key="none", max_retries=0)
    for seed in SEEDS:
        expected = served.server.answer(PROMPT, max_new_tokens=20, temperature=1.0, seed=seed)["text"]
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=seed, logprobs=5)
        chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=seed, stream=True)
        assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == expected
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.top_logprobs is not None
        assert all(5 <= len(each) <= 6 for each in logprobs.top_logprobs), "no two tokens are shown alike"
