"""What else the page can do: go on with a text, hand it to other programs, show the server's work and what is known."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from model.tokenizer import Tokenizer
from tests.checkpoints import tiny_checkpoint, tiny_report
from tests.e2e.conftest import OpenPage
from tests.e2e.reading import (
    LONG,
    PATIENCE_MS,
    expect_state,
    generate,
    letters,
    settings,
    wait_for_letters,
    wait_until_done,
    written,
)
from tests.service.serving import PATIENCE_S, Server

KEY = "the-4pple-is-red"


@pytest.fixture
def locked_server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "log", "--checkpoint", checkpoint, "--threads", 1, "--api-key", KEY)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def copied(page: Page, what: str) -> str:
    page.get_by_role("button", name=f"Copy as {what}").click()
    expect_state(page, "Copied.")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def run_python(program: str, **environment: str) -> str:
    """What it prints; its process has nothing of ours but the interpreter."""
    return subprocess.run(
        [sys.executable, "-I", "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout


def cells(page: Page) -> list[list[str]]:
    return [row.locator("td").all_text_contents() for row in page.locator("#heat tbody tr").all()]


def continue_text(page: Page) -> None:
    page.get_by_role("button", name="Continue").click()


def test_continue_makes_the_text_that_a_longer_request_makes(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(max_new_tokens=60, seed="")).page
    generate(page)
    wait_until_done(page)
    first = written(page)
    for length in (120, 180):
        continue_text(page)
        wait_for_letters(page, length)
        wait_until_done(page)
    seed = int(page.locator("#used-seed").inner_text())
    answer = server.answer(max_new_tokens=180, seed=seed)
    assert written(page) == answer["text"]
    assert written(page).startswith(first)
    assert "".join(page.locator("#spoken p").all_text_contents()) == answer["text"]
    assert "max_new_tokens=180" in page.url  # the link makes the text shown
    expect(page.locator("#heat-note")).to_contain_text(f"all {answer['routing']['tokens']} tokens")


@pytest.fixture
def byte_server(tmp_path: Path) -> Iterator[Server]:
    folder = tiny_checkpoint(tmp_path / "bytes", tokenizer=Tokenizer.of_bytes())
    server = Server(tmp_path / "log", "--checkpoint", folder, "--slots", 2, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def test_continue_goes_on_inside_a_character(byte_server: Server, open_page: OpenPage) -> None:
    """Random bytes, many of which begin a character of several: what it lacks is told as U+FFFD at the end alone."""
    texts = {length: byte_server.answer(max_new_tokens=length, seed=7)["text"] for length in range(20, 60)}
    cut = next(length for length in range(20, 59) if not texts[length + 1].startswith(texts[length]))
    page = open_page(byte_server, settings(max_new_tokens=cut)).page
    generate(page)
    wait_until_done(page)
    assert written(page) == texts[cut]
    continue_text(page)
    wait_for_letters(page, 2 * cut)
    wait_until_done(page)
    assert written(page) == byte_server.answer(max_new_tokens=2 * cut, seed=7)["text"]


def test_continue_after_stop_goes_on_where_it_was(reported_server: Server, open_page: OpenPage) -> None:
    page = open_page(reported_server, settings(max_new_tokens=LONG)).page
    generate(page)
    wait_for_letters(page, 30)
    page.keyboard.press("Escape")
    expect_state(page, f"Stopped after {letters(page).count()} tokens.")
    length = letters(page).count() + 50
    page.locator("#settings").evaluate("settings => settings.open = true")
    page.get_by_label("Length").first.fill("50")
    continue_text(page)
    wait_until_done(page)
    assert letters(page).count() == length
    assert written(page) == reported_server.answer(max_new_tokens=length, seed=7)["text"]


def test_continue_lengthens_both_texts_up_to_what_the_server_allows(server: Server, open_page: OpenPage) -> None:
    most = server.client.get("/info").json()["limits"]["max_new_tokens"]
    page = open_page(server, settings(max_new_tokens=most - 60, silenced="1.1", temperature=0)).page
    generate(page)
    expect(page.locator("#verdict")).not_to_be_empty(timeout=PATIENCE_MS)
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    continue_text(page)
    for id, silenced in (("text", []), ("text-without", [[1, 1]])):
        expect(page.locator(f"#{id} .letter")).to_have_count(most, timeout=PATIENCE_MS)
        expected = server.answer(max_new_tokens=most, seed=7, temperature=0, disabled_experts=silenced)["text"]
        assert "".join(page.locator(f"#{id} .letter").all_text_contents()) == expected
    expect_state(page, "Done.")
    expect(page.get_by_role("button", name="Continue")).to_be_disabled()


def test_the_card_tells_what_else_was_likely_there(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(max_new_tokens=40)).page
    generate(page)
    wait_until_done(page)
    token = server.answer(max_new_tokens=40, seed=7, logprobs=5)["tokens"][20]
    letters(page).nth(20).hover()
    shown = page.locator("#card .likely b").all_text_contents()
    signs = {" ": "␣", "\n": "↵"}
    expected = [signs.get(each["text"], each["text"]) for each in token["top_logprobs"]]
    assert shown[:5] == expected
    drawn = page.locator("#card .drawn b")
    expect(drawn).to_have_text(signs.get(token["text"], token["text"]))
    assert len(shown) == (5 if drawn.inner_text() in expected else 6)
    page.locator("#text").press("Home")
    expect(page.locator("#told")).to_contain_text("likeliest here: ")


def test_the_python_program_prints_the_text_of_the_page(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(prompt='\'Tis $HOME \\ "not"\n é {x}', silenced="1.2")).page
    generate(page)
    expect(page.locator("#verdict")).not_to_be_empty(timeout=PATIENCE_MS)
    text = "".join(page.locator("#text-without .letter").all_text_contents())
    assert run_python(copied(page, "Python")) == text != written(page)


def test_an_empty_field_is_copied_as_its_default(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(temperature=0)).page
    expect_state(page, "Ready.")
    page.locator("#settings").evaluate("settings => settings.open = true")
    for name in ("Length", "Top k"):
        page.get_by_label(name).first.fill("")
    length = server.client.get("/info").json()["defaults"]["max_new_tokens"]
    text = server.answer(max_new_tokens=length, seed=7, temperature=0)["text"]
    assert run_python(copied(page, "Python")) == text
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#command")).to_contain_text(f'"max_new_tokens":{length},"temperature":0,"top_k":0,')


def test_behind_a_prefix_and_with_a_key_everything_works_and_python_takes_the_key_from_the_environment(
    locked_server: Server, open_page: OpenPage
) -> None:
    open_page(locked_server).page.context.route(
        "**/some/prefix/**",
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/some/prefix", ""))),
    )
    visit = open_page(locked_server, settings(), path="/some/prefix/")
    page = visit.page
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect_state(page, "Ready.")
    page.get_by_role("radio", name="Server").check()
    generate(page)
    wait_until_done(page)
    expect(page.locator("#heat-note")).to_have_text("In percent, over all requests of the last minute.")
    page.get_by_role("button", name="Expert 1 of layer 1", exact=True).click()
    expect(page.locator("#verdict")).not_to_be_empty(timeout=PATIENCE_MS)
    assert [url for url in visit.asked if not url.startswith((f"{locked_server.url}/some/prefix/", "data:"))] == []

    program = copied(page, "Python")
    assert KEY not in program + page.content() + page.url
    assert f'"{locked_server.url}/some/prefix/generate"' in program
    answer = run_python(program.replace("/some/prefix", ""), MOESCOPE_API_KEY=KEY)
    assert answer == "".join(page.locator("#text-without .letter").all_text_contents())


def test_the_servers_work_is_shown_live_and_nobody_asks_for_it_unseen(
    reported_server: Server, open_page: OpenPage
) -> None:
    visit = open_page(reported_server).hurry(times=10)
    page = visit.page
    page.get_by_role("radio", name="Server").check()
    for tokens in (300, 3000):
        reported_server.answer("JULIET:", max_new_tokens=tokens, disabled_experts=[[0, 1], [2, 2]])
        layers = reported_server.client.get("/experts", params={"window": 60}).json()["layers"]
        for layer, row in zip(layers, page.locator("#heat tbody tr").all(), strict=True):
            percents = [round(100 * share) for share in layer["share"]]
            near = [re.compile(f"^({percent - 1}|{percent or ''}|{percent + 1})$") for percent in percents]
            expect(row.locator("td")).to_have_text(near)

    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { get: () => window.unseen ?? false });
            window.unseen = true;
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    hurried = len(visit.asked)
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 10000))")  # five turns of asking
    assert len(visit.asked) <= hurried + 1  # one may have been on its way
    page.evaluate("window.unseen = false")
    with page.expect_request("**/experts?window=60"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_role("radio", name="This text").check()
    hurried = len(visit.asked)
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 10000))")
    assert len(visit.asked) <= hurried + 1


def test_the_causal_map_and_the_likes_are_those_of_the_report(reported_server: Server, open_page: OpenPage) -> None:
    page = open_page(reported_server).page
    report: dict[str, Any] = reported_server.client.get("/experts/report").json()
    page.get_by_role("radio", name="Cost").check()
    costs, errors = report["causal_map"]["cost"], report["causal_map"]["standard_error"]
    for layer, row in enumerate(cells(page)):
        expected = [100 * cost for cost in costs[layer]]  # for small costs the rise of perplexity is nearly the cost
        assert [float(text.replace("−", "-")) for text in row] == pytest.approx(expected, abs=0.15)
        faint = page.locator("#heat tbody tr").nth(layer).locator("button")
        is_faint = faint.evaluate_all("all => all.map(one => one.classList.contains('faint'))")
        assert is_faint == [abs(cost) < 2 * error for cost, error in zip(costs[layer], errors[layer], strict=True)]

    page.get_by_role("radio", name="Likes").check()
    signs = {" ": "␣", "\n": "↵"}
    for row, liked in zip(cells(page), report["favourites"], strict=True):
        assert [text.replace("\u200a", "") for text in row] == [
            "".join(signs.get(each["token"], each["token"]) for each in of_expert) for of_expert in liked
        ]
    page.get_by_role("button", name="Expert 1 of layer 2", exact=True).hover()
    expect(page.locator("#expert")).to_contain_text("silencing it raises perplexity by 2.7")


def test_without_a_report_there_is_no_view_of_it(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, "view=cost").page
    expect_state(page, "Ready.")
    expect(page.get_by_role("group", name="Show").get_by_role("radio")).to_have_count(2)
    expect(page.get_by_role("radio", name="This text")).to_be_checked()


def test_however_fast_tokens_come_letters_are_drawn_once_a_frame(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(max_new_tokens=3000)).page
    stream = server.generate(max_new_tokens=3000, seed=7, return_routed_experts=True, logprobs=5).text
    page.route("**/generate", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    page.evaluate(
        """() => {
            window.draws = 0;
            new MutationObserver(() => draws++).observe(text, { childList: true, subtree: true });
        }"""
    )
    generate(page)
    wait_until_done(page)
    assert letters(page).count() == 3000
    assert page.evaluate("draws") < 300  # it has them all at once, and a drawing for each would be 3,000


def test_the_tiny_report_is_of_the_shape_that_a_report_has(checkpoint: Path) -> None:
    shipped = json.loads((Path(__file__).parents[2] / "checkpoints" / "shakespeare" / "report.json").read_text())
    tiny = tiny_report(checkpoint)
    assert set(tiny) <= set(shipped)
    assert set(tiny["causal_map"]) == set(shipped["causal_map"])
    assert set(tiny["favourites"][0][0][0]) == set(shipped["favourites"][0][0][0])
