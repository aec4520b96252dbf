"""A model whose tokens are hostile strings writes them as text: on the page, in streams, and to OpenAI's client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from openai import OpenAI
from playwright.sync_api import Browser, Dialog, Frame, Locator, Page
from tokenizers import Regex, decoders, models, pre_tokenizers

from model import checkpoint
from model.tokenizer import Tokenizer
from tests.checkpoints import CHARACTERS, tiny_files, tiny_model
from tests.e2e.conftest import OpenPage, Visit
from tests.e2e.hostile import HOSTILE
from tests.e2e.reading import expect_state, generate, letters, settings, wait_until_done
from tests.service.serving import PATIENCE_S, Server

ENOUGH = 400
"""Tokens: more than there are in the vocabulary."""
GREEDY: dict[str, Any] = {"max_new_tokens": ENOUGH, "temperature": 0}


def hostile_checkpoint(folder: Path) -> Path:
    """Its tokens are the hostile strings and the letters that a prompt needs; it tells them one after the other."""
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys((*HOSTILE, *CHARACTERS)))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    model = tiny_model(vocab_size=len(vocabulary))
    with torch.no_grad():
        for layer in model.layers:
            for update in (layer.attention.out.weight, layer.moe.experts.down):
                update.mul_(0.01)
        directions = F.normalize(model.embedding.weight, dim=-1)
        model.embedding.weight.copy_(directions)
        model.head.weight.copy_(directions.roll(1, dims=0))  # so the likeliest token is the one with the next id
    checkpoint.save(folder, tiny_files(model, Tokenizer(inner)))
    return folder


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    server = Server(folder / "log", "--checkpoint", hostile_checkpoint(folder / "tiny"), "--slots", 4, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


class Guard:
    """Sees what text would do on a page if it were more than text."""

    def __init__(self, visit: Visit) -> None:
        self.page = visit.page
        self._visit = visit
        self._opened: list[str] = []
        self.page.on("dialog", self._on_dialog)
        self.page.on("popup", lambda page: self._opened.append(page.url))
        self.page.on("framenavigated", self._on_navigation)
        self.page.add_init_script(
            """
            window.seen = [];
            window.ran = () => seen.push("a script ran");
            addEventListener("securitypolicyviolation", (report) => seen.push(report.violatedDirective));
            """
        )
        self.page.reload()

    def _on_dialog(self, dialog: Dialog) -> None:
        self._opened.append(dialog.message)
        dialog.dismiss()

    def _on_navigation(self, frame: Frame) -> None:
        if frame != self.page.main_frame:
            self._opened.append(frame.url)

    def assert_nothing_happened(self, server: Server) -> None:
        assert self.page.evaluate("seen") == []
        assert self._opened == []
        assert self._visit.complaints == []
        assert [address for address in self._visit.asked if not address.startswith(f"{server.url}/")] == []
        assert self.page.url.partition("#")[0] == f"{server.url}/"


def texts_of(server: Server, **body: Any) -> list[str]:
    return [data["text"] for name, data in server.events(**body) if name == "token"]


def contents(found: Locator) -> list[str]:
    texts: list[str] = found.evaluate_all("all => all.map(one => one.textContent)")
    return texts


@pytest.fixture(scope="module")
def written(hostile_server: Server, browser: Browser) -> Iterator[Guard]:
    """The page with a text in which every hostile string stands."""
    with browser.new_context() as context:
        visit = Visit(context.new_page())
        visit.page.goto(f"{hostile_server.url}/#{settings(**GREEDY)}")
        guard = Guard(visit)
        generate(guard.page)
        wait_until_done(guard.page)
        yield guard


def test_text_is_shown_token_by_token_as_it_was_written_and_nothing_in_it_runs(
    hostile_server: Server, written: Guard
) -> None:
    page = written.page
    tokens = texts_of(hostile_server, **GREEDY)
    assert set(tokens) >= set(HOSTILE)
    assert contents(letters(page)) == tokens
    assert "".join(contents(page.locator("#spoken p"))) == "".join(tokens)
    ours = "#text > div, span.given, span.letter"
    assert page.evaluate("ours => [...text.querySelectorAll('*')].every(one => one.matches(ours))", ours)
    written.assert_nothing_happened(hostile_server)


def told_of_each(page: Page, indexes: list[int]) -> list[str]:
    """What the card says when a reader points at the letters, one after the other."""
    told: list[str] = page.evaluate(
        """indexes => indexes.map((index) => {
            const letter = text.querySelector(`[data-index="${index}"]`);
            letter.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
            return card.textContent;
        })""",
        indexes,
    )
    return told


def test_the_card_names_every_token_and_nothing_in_it_runs(hostile_server: Server, written: Guard) -> None:
    page = written.page
    tokens = contents(letters(page))
    first = {token: index for index, token in reversed(list(enumerate(tokens)))}
    for token, told in zip(HOSTILE, told_of_each(page, [first[each] for each in HOSTILE]), strict=True):
        assert token in told or token.isspace()  # the card has words for some that cannot be seen
    assert page.locator("#card :is(script, img, svg, iframe, style, a)").count() == 0

    page.locator("#text").press("Home")
    for token in tokens[:40]:
        (told_aloud,) = contents(page.locator("#told"))
        assert token in told_aloud or token.isspace()
        page.locator("#text").press("ArrowRight")
    written.assert_nothing_happened(hostile_server)


def test_no_token_turns_round_the_words_beside_it(hostile_server: Server, written: Guard) -> None:
    """Some of them change the direction of writing."""
    turned = written.page.evaluate(
        """hostile => [...text.querySelectorAll(".letter")].filter((letter) => {
            if (!hostile.includes(letter.textContent)) return false;
            letter.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
            const [title] = card.querySelector("h2").childNodes;
            const start = title.data.lastIndexOf(", token ");
            const [from, to] = [start + 2, title.length - 1].map((place) => {
                const range = new Range();
                range.setStart(title, place);
                range.setEnd(title, place + 1);
                return range.getBoundingClientRect();
            });
            return from.top === to.top && from.left > to.left;
        }).map((letter) => letter.textContent)""",
        HOSTILE,
    )
    assert turned == []
    assert written.page.locator("#card h2").count() == 1
    written.assert_nothing_happened(hostile_server)


def test_a_hostile_beginning_is_read_told_and_copied_as_text(
    server: Server, open_page: OpenPage, tmp_path: Path
) -> None:
    prompt = "".join(each for each in HOSTILE if len(each) < 100).replace("\r\n", "\n").replace("\r", "\n")
    visit = open_page(server, settings(prompt=prompt, max_new_tokens=20))
    guard, page = Guard(visit), visit.page
    generate(page)
    wait_until_done(page)
    used = json.loads(server.generate(prompt, stream=False, unknown_characters="fold", seed=7).text)["prompt_used"]
    assert contents(page.locator("#text .given")) == [used]
    assert page.get_by_label("Begin with").input_value() == prompt

    page.get_by_role("button", name="Copy as curl").click()
    expect_state(page, "Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=PATIENCE_S, check=True)
    assert list(tmp_path.iterdir()) == []
    guard.assert_nothing_happened(server)


def data_of(stream: str, ends: Any) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in ends(stream) if line.startswith("data: {")]


def test_a_stream_is_the_same_to_clients_that_know_other_ends_of_lines(hostile_server: Server) -> None:
    """The format has three ends of a line; Python's splitlines, on which some clients stand, has eight more."""
    stream = hostile_server.generate(**GREEDY, logprobs=5).content.decode()
    events = data_of(stream, str.splitlines)
    assert events == data_of(stream, lambda text: text.split("\n"))
    assert len(events) == ENOUGH + 2
    assert "".join(event["text"] for event in events[1:-1]) == events[-1]["text"]


def test_openai_s_client_reads_the_same_text(hostile_server: Server) -> None:
    client = OpenAI(base_url=f"{hostile_server.url}/v1", api_key="none", max_retries=0)
    wish: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": ENOUGH, "temperature": 0, "logprobs": 5}
    chunks = list(client.completions.create(model="tiny", stream=True, **wish))
    pieces = [chunk.choices[0].text for chunk in chunks]
    tokens = [token for chunk in chunks if (told := chunk.choices[0].logprobs) for token in told.tokens or ()]
    whole = client.completions.create(model="tiny", stream=False, **wish).choices[0]
    expected = texts_of(hostile_server, **GREEDY)
    assert set(expected) >= set(HOSTILE)
    assert pieces[: len(expected)] == tokens == expected
    assert "".join(pieces) == whole.text == "".join(expected)
