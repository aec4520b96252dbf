"""The page as its reader has it: a real browser in front of a real server."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import OpenPage, Visit
from tests.e2e.reading import (
    choose_layer,
    expect_state,
    generate,
    letters,
    settings,
    tints,
    top_experts,
    wait_for_letters,
    wait_until_done,
    written,
)
from tests.service.serving import PATIENCE_S, Event, Server, free_port, parse_events

KEY = "the-4pple-is-red"


@pytest.fixture
def lock(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a server with a key; each comes to the same address, where the one before goes away."""
    port, servers = free_port(), list[Server]()

    def lock(key: str) -> Server:
        for server in servers:
            server.process.kill()
            server.process.wait()
        log = tmp_path / f"log-{len(servers)}"
        servers.append(Server(log, "--checkpoint", checkpoint, "--threads", 1, "--api-key", key, port=port))
        return servers[-1].wait_until_ready()

    try:
        yield lock
    finally:
        for server in servers:
            server.stop()


def give_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.keyboard.press("Enter")


def shown_of(page: Page) -> str:
    """All that the page could tell of a key, but for what stands in its field."""
    return page.url + page.content() + str(page.evaluate("document.body.innerText"))


def complaints_but_for_401(visit: Visit) -> list[str]:
    """Chromium itself reports each."""
    return [complaint for complaint in visit.complaints if "status of 401" not in complaint]


def events_of_generating(page: Page) -> list[Event]:
    """What the page itself is sent, from start to done."""
    page.evaluate(
        """() => {
            const fetch = window.fetch;
            window.fetch = async (...request) => {
                const response = await fetch(...request);
                window.received = response.clone().text();
                return response;
            };
        }"""
    )
    generate(page)
    wait_until_done(page)
    return parse_events(page.evaluate("received").split("\n"))


def token_events(page: Page) -> list[dict[str, Any]]:
    return [data for name, data in events_of_generating(page) if name == "token"]


def test_text_appears_in_several_updates_before_the_end(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(max_new_tokens=600), slowly=True).page
    page.evaluate(
        """() => {
            window.lengths = [];
            const count = () => text.querySelectorAll(".letter").length;
            const note = () => document.getElementById("stop").disabled || lengths.push(count());
            new MutationObserver(note).observe(text, { childList: true, subtree: true });
        }"""
    )
    generate(page)
    wait_until_done(page)
    lengths = page.evaluate("lengths")
    assert len(set(lengths)) > 5
    assert lengths == sorted(lengths)
    assert letters(page).count() == 600


def test_lines_stand_apart_and_are_copied_as_one_text(server: Server, open_page: OpenPage) -> None:
    """Apart, because a browser lays out the whole of what stands together with every letter that joins it."""
    page = open_page(server, settings(prompt="O Romeo,\nRomeo", max_new_tokens=600)).page
    generate(page)
    wait_until_done(page)
    answer = server.answer(prompt="O Romeo,\nRomeo", max_new_tokens=600, seed=7)["text"]
    first, *others = answer.splitlines(keepends=True)
    assert len(others) > 5
    lines = page.locator("#text > *").all_text_contents()
    assert [line for line in lines if line] == [f"O Romeo,\nRomeo{first}", *others]
    page.evaluate("getSelection().selectAllChildren(text)")
    page.keyboard.press("Control+C")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.rstrip("\n") == f"O Romeo,\nRomeo{answer}".rstrip("\n")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_stream_and_frees_the_slot(server: Server, open_page: OpenPage, how: str) -> None:
    page = open_page(server, settings(max_new_tokens=4096), slowly=True).page
    num_cancelled = server.metrics().total("requests_total", outcome="cancelled")
    generate(page)
    wait_for_letters(page, 20)
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect_state(page, re.compile(r"^Stopped after \d+ tokens\.$"))
    server.wait_for(requests_running=0)
    assert server.metrics().total("requests_total", outcome="cancelled") == num_cancelled + 1
    assert 20 <= letters(page).count() < 4096


def test_a_letter_has_the_tint_and_number_of_its_top_expert_in_every_layer(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    tokens = token_events(page)
    legend = tints(page.locator("#legend li"))
    assert len(set(legend)) == len(legend)
    assert "".join(token["text"] for token in tokens) == written(page)
    for layer in range(len(tokens[0]["routed_experts"])):
        choose_layer(page, layer)
        expected = top_experts(tokens, layer)
        numbers = letters(page).evaluate_all("all => all.map(one => Number(one.dataset.expert))")
        assert numbers == expected
        assert tints(letters(page)) == [legend[expert] for expert in expected]


def test_switching_layers_while_text_comes_tints_old_and_new_letters(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(max_new_tokens=600), slowly=True).page
    generate(page)
    wait_for_letters(page, 50)
    choose_layer(page, 1)
    wait_until_done(page)
    switched_midway = tints(letters(page))
    choose_layer(page, 0)
    assert tints(letters(page)) != switched_midway
    choose_layer(page, 1)
    assert tints(letters(page)) == switched_midway


def test_numbers_under_the_letters_say_what_the_tint_says(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    generate(page)
    wait_until_done(page)
    page.get_by_label("Numbers").check()
    letter = page.locator("#text .letter:not(.break)").first
    shown = letter.evaluate("one => getComputedStyle(one, '::after').content")
    assert re.findall(r"\d+", shown) == [letter.get_attribute("data-expert")]


def test_the_heatmap_ends_on_the_counts_of_the_request(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    name, done = events_of_generating(page)[-1]
    assert name == "done"
    rows = [row.locator("td").all_text_contents() for row in page.locator("#heat tbody tr").all()]
    for shown, row in zip(rows, done["routing"]["counts"], strict=True):
        # JavaScript rounds a half up, Python to even; both are within half a percent.
        assert [int(cell or 0) for cell in shown] == pytest.approx([100 * count / sum(row) for count in row], abs=0.501)


def test_the_address_and_same_seed_make_the_same_text_again(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, "prompt=JULIET:&max_new_tokens=120&temperature=1.1&top_k=20&top_p=0.95&layer=1").page
    generate(page)
    wait_until_done(page)
    text = written(page)
    page.get_by_role("button", name="Same seed").click()
    expect_state(page, "Done.")
    assert written(page) == text

    page.reload()  # the address has the drawn seed by now
    expect(page.get_by_label("Top k", exact=False).first).to_have_value("20")
    expect(page.locator("#layer-1")).to_be_checked()
    generate(page)
    wait_until_done(page)
    assert written(page) == text


def test_the_curl_line_makes_the_text_of_the_page(server: Server, open_page: OpenPage) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    page = open_page(server, settings(prompt='\'Tis $HOME \\ "not"\n')).page
    generate(page)
    wait_until_done(page)
    page.get_by_role("button", name="Copy as curl").click()
    expect_state(page, "Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert parse_events(answer.stdout.split("\n"))[-1][1]["text"] == written(page)


def test_foreign_characters_are_folded_and_the_reader_is_told(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(prompt="KÉNT — 日")).page
    generate(page)
    wait_until_done(page)
    expect(page.locator("#folded")).to_have_text("Not in the model’s alphabet: É — 日. It read: KENT - ")
    expect(page.locator("#text .given")).to_have_text("KENT - ")


@pytest.mark.parametrize(
    ("prompt", "words"), [("", None), ("日本", "Not in the model’s alphabet: 日 本. It read: (nothing)")]
)
def test_a_prompt_of_nothing_is_read_as_a_line_break(
    server: Server, open_page: OpenPage, prompt: str, words: str
) -> None:
    page = open_page(server, settings(prompt=prompt)).page
    generate(page)
    wait_until_done(page)
    if words:
        expect(page.locator("#folded")).to_have_text(words)
    else:
        expect(page.locator("#folded")).to_be_hidden()


def test_arrow_keys_go_from_letter_to_letter_and_tell_their_experts(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    token = token_events(page)[1]
    page.locator("#text").press("ArrowRight")
    page.locator("#text").press("ArrowRight")
    expect(page.locator("#card .row")).to_have_count(len(token["routed_experts"]))
    experts = sorted(page.locator("#card .row").first.locator("b").all_text_contents())
    assert experts == sorted(map(str, token["routed_experts"][0]))
    expect(page.locator("#told")).to_contain_text(f"expert {top_experts([token], 0)[0]}")
    page.keyboard.press("Escape")
    expect(page.locator("#card")).to_be_hidden()


def test_a_screen_reader_is_told_whole_sentences(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    generate(page)
    wait_until_done(page)
    told = page.locator("#spoken p").all_text_contents()
    assert "".join(told) == written(page)
    assert all(re.search(r"[.!?][\"')]*\s$|\n\n$", sentence) for sentence in told[:-1])


def test_a_text_without_a_sentence_s_end_is_told_in_bounded_portions_of_whole_words(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(server, settings()).page
    endless = re.sub(
        r'"text":"(?:[.!?]|\\n)"',
        '"text":" "',
        server.generate(max_new_tokens=3000, seed=7, return_routed_experts=True).text,
    )
    page.route("**/generate", lambda route: route.fulfill(body=endless, content_type="text/event-stream"))
    generate(page)
    wait_until_done(page)
    told = page.locator("#spoken p").all_text_contents()
    assert "".join(told) == written(page)
    assert max(map(len, told)) <= 501
    assert all(words.endswith(" ") for words in told[:-1])


def test_the_page_complains_of_nothing_and_asks_nobody_else(server: Server, open_page: OpenPage) -> None:
    visit = open_page(server, settings())
    page = visit.page
    generate(page)
    wait_until_done(page)
    choose_layer(page, 1)
    page.get_by_label("Numbers").check()
    letters(page).nth(10).hover()
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#command")).to_be_visible()
    assert visit.complaints == []
    assert all(address.startswith(f"{server.url}/") for address in visit.asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(
    server: Server, open_page: OpenPage, scheme: Literal["light", "dark"]
) -> None:
    page = open_page(server, settings(), width=360).page
    page.emulate_media(color_scheme=scheme)
    generate(page)
    wait_until_done(page)
    page.get_by_label("Numbers").check()
    page.locator("#settings summary").click()
    page.get_by_role("button", name="Copy as curl").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    letters(page).nth(5).hover()
    card = page.locator("#card").bounding_box()
    assert card
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= 360


def test_a_server_that_comes_late_fills_up_and_goes_away_is_told_in_words(
    narrow_server: Server, open_page: OpenPage
) -> None:
    page = open_page(narrow_server.wait_until_it_listens(), settings(max_new_tokens=4096), slowly=True).page
    expect_state(page, "Ready.")
    written_before = open_page(narrow_server, settings()).page
    generate(written_before)
    wait_until_done(written_before)
    generate(page)
    wait_for_letters(page, 5)

    waiting = open_page(narrow_server, settings()).page
    generate(waiting)
    narrow_server.wait_for(requests_queued=1)
    refused = open_page(narrow_server, settings()).page
    generate(refused)
    expect_state(refused, re.compile(r"wait.*; try again in \d+ s\.$"))

    written_before.get_by_role("button", name="Continue").click()
    expect_state(written_before, re.compile(r"wait.*; try again in \d+ s\. What arrived is kept\.$"))
    expect(written_before.get_by_role("button", name="Continue")).to_be_enabled()

    narrow_server.process.kill()
    expect_state(page, re.compile(r"^The connection was lost after \d+ tokens; picking it up again …$"))
    assert letters(page).count() >= 5
    generate(refused)
    expect_state(refused, "The service cannot be reached. Is it running?")


def test_a_server_with_a_key_is_asked_with_it_from_when_the_reader_gives_it(
    lock: Callable[[str], Server], open_page: OpenPage
) -> None:
    visit = open_page(lock(KEY), settings(), width=360)
    page = visit.page
    expect_state(page, "This server needs a key.")
    height = page.locator("#form").evaluate("form => form.offsetHeight")
    page.get_by_label("Begin with").press("Control+Enter")  # nothing to do yet
    give_key(page, f"{KEY}é")  # cannot be sent; the browser says so
    expect_state(page, "This server needs a key.")
    expect(page.locator("#settings")).not_to_have_attribute("open", "")
    give_key(page, "wrong")
    expect_state(page, "The server refuses this key.")
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    give_key(page, KEY)
    expect_state(page, "Ready.")
    assert KEY not in shown_of(page)
    assert page.locator("#form").evaluate("form => form.offsetHeight") == height
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.get_by_label("Key", exact=True)).to_be_hidden()
    page.keyboard.press("Enter")
    wait_until_done(page)
    assert letters(page).count() > 0
    assert KEY not in shown_of(page)

    page.reload()
    expect_state(page, "Ready.")
    page.goto(f"{page.url.partition('#')[0]}docs")  # which asks for the same key
    expect(page.locator(".opblock-post").first).to_be_visible()
    expect(page.locator("#ask")).to_be_hidden()
    assert KEY not in page.url
    assert complaints_but_for_401(visit) == []


def test_the_curl_line_for_a_server_with_a_key_takes_it_from_the_environment(
    lock: Callable[[str], Server], open_page: OpenPage
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    page = open_page(lock(KEY), settings()).page
    give_key(page, KEY)
    generate(page)
    wait_until_done(page)
    page.get_by_role("button", name="Copy as curl").click()
    expect_state(page, "Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in command + shown_of(page)
    answer = subprocess.run(
        ["sh", "-c", command],
        env=os.environ | {"MOESCOPE_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert parse_events(answer.stdout.split("\n"))[-1][1]["text"] == written(page)


def test_a_text_goes_on_with_the_key_and_ends_in_words_when_the_key_is_another(
    lock: Callable[[str], Server], open_page: OpenPage
) -> None:
    page = open_page(lock(KEY), settings(max_new_tokens=2000), slowly=True).page
    give_key(page, KEY)
    generate(page)
    wait_for_letters(page, 5)
    lock(KEY)
    wait_until_done(page)
    assert letters(page).count() == 2000

    generate(page)
    wait_for_letters(page, 5)
    lock("another")
    expect_state(
        page,
        re.compile(r"^The connection was lost after \d+ tokens\. The server refuses this key\. What arrived is kept.$"),
    )
    assert letters(page).count() >= 5
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    give_key(page, "another")
    expect_state(page, "Ready.")
    generate(page)
    wait_until_done(page)
