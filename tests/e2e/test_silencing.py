"""Silencing an expert on the page: the same seed without it, side by side with the text that was there."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Request, Route, expect

from tests.e2e.conftest import OpenPage
from tests.e2e.reading import (
    LONG,
    PATIENCE_MS,
    choose_layer,
    expect_state,
    generate,
    letters,
    settings,
    wait_for_letters,
    wait_until_done,
    written,
)
from tests.service.serving import Server


def cell(page: Page, layer: int, expert: int) -> Locator:
    return page.get_by_role("button", name=f"Expert {expert} of layer {layer}", exact=True)


def letters_without(page: Page) -> Locator:
    return page.locator("#text-without .letter")


def expect_comparison(page: Page) -> None:
    """Both texts are whole."""
    expect(page.locator("#verdict")).not_to_be_empty(timeout=PATIENCE_MS)
    expect_state(page, "Done.")


def assert_marks(page: Page) -> list[bool]:
    """Each place where the texts differ is marked in both, the first with a sign of its own, and no other."""
    texts = [letters(page).all_text_contents(), letters_without(page).all_text_contents()]
    differs = [one != other for one, other in zip(*texts, strict=True)]
    for shown in (letters(page), letters_without(page)):
        assert shown.evaluate_all("all => all.map(one => 'differs' in one.dataset)") == differs
        forks = shown.evaluate_all("all => all.flatMap((one, index) => ('fork' in one.dataset ? [index] : []))")
        assert forks == [differs.index(True)]
    return differs


def note_requests(page: Page) -> list[dict[str, Any]]:
    """The bodies that the page sends from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/generate"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", note)
    return bodies


def answer_to(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """What the server itself makes of a body of the page."""
    answer: dict[str, Any] = server.client.post("/generate", json={**body, "stream": False}).json()
    return answer


def test_a_click_writes_the_same_seed_without_the_expert_beside_the_text(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(seed="")).page
    bodies = note_requests(page)
    generate(page)
    wait_until_done(page)
    before, seed = written(page), int(page.locator("#used-seed").inner_text())

    cell(page, 1, 2).click()
    expect_comparison(page)
    assert bodies[1] == {**bodies[0], "seed": seed, "disabled_experts": [[1, 2]]}
    answer = answer_to(server, bodies[1])
    assert answer["routing"]["counts"][1][2] == 0
    assert "".join(letters_without(page).all_text_contents()) == answer["text"] != before
    assert written(page) == before
    expect(page.locator("#without-title")).to_have_text("Without expert 2 of layer 1")
    expect(cell(page, 1, 2)).to_have_attribute("aria-pressed", "true")
    # Its layer is the one that is shown now, and it has no letter there, nor any work.
    expect(page.locator("#layer-1")).to_be_checked()
    assert "2" not in letters_without(page).evaluate_all("all => all.map(one => one.dataset.expert)")
    assert "2" in letters(page).evaluate_all("all => all.map(one => one.dataset.expert)")
    expect(cell(page, 1, 2)).to_have_text("")
    expect(page.locator("#expert")).to_contain_text("Expert 2 of layer 1, silenced: 0\u202f% of this text’s work")


def test_every_letter_that_differs_is_marked_and_the_verdict_counts_them(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    generate(page)
    wait_until_done(page)
    cell(page, 2, 0).click()
    expect_comparison(page)
    choose_layer(page, 0)  # tints are made anew, marks stay
    differs = assert_marks(page)
    fork = differs.index(True)
    verdict = page.locator("#verdict").inner_text()
    after = len(differs) - fork
    numbers = list(map(int, re.findall(r"\d+", verdict)))
    assert numbers == pytest.approx([*([fork] if fork else []), after, 100 * sum(differs) / after], abs=0.501)
    expect(page.locator("#told")).to_have_text(verdict)


def test_more_experts_are_silenced_and_speak_again_while_the_whole_text_stays(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(server, settings()).page
    bodies = note_requests(page)
    generate(page)
    wait_until_done(page)
    before = written(page)
    for layer, expert in [(2, 3), (0, 1)]:
        cell(page, layer, expert).click()
        expect_comparison(page)
        assert_marks(page)
    expect(page.locator("#without-title")).to_have_text("Without expert 1 of layer 0, expert 3 of layer 2")
    cell(page, 2, 3).click()
    expect_comparison(page)
    expect(page.locator("#without-title")).to_have_text("Without expert 1 of layer 0")
    silenced = [body.get("disabled_experts") for body in bodies]
    assert silenced == [None, [[2, 3]], [[0, 1], [2, 3]], [[0, 1]]]

    page.get_by_role("button", name="Let all experts speak again").click()
    expect(page.locator("#text-without")).to_be_hidden()
    expect(page.locator("#verdict")).to_be_empty()
    expect(page.locator("#heat [aria-pressed=true]")).to_have_count(0)
    expect(page.locator("[data-differs], [data-fork]")).to_have_count(0)
    assert "silenced" not in page.url
    assert written(page) == before
    assert len(bodies) == 4


def test_a_layer_keeps_as_many_experts_as_a_token_needs(server: Server, open_page: OpenPage) -> None:
    page = open_page(server).page
    expect_state(page, "Ready.")
    bodies = note_requests(page)
    for expert in (0, 1, 2):
        cell(page, 1, expert).click()
    expect_state(page, "Layer 1 cannot do with fewer than 2 experts.")
    expect(cell(page, 1, 2)).to_have_attribute("aria-pressed", "false")
    assert bodies == []


def test_silenced_before_there_is_a_text_both_are_written_from_one_new_seed(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(server, settings(seed="")).page
    expect_state(page, "Ready.")
    bodies = note_requests(page)
    cell(page, 0, 3).click()
    expect_state(page, "Generate writes two texts: with all experts, and without these.")
    generate(page)
    expect_comparison(page)
    assert sorted(body.get("disabled_experts", []) for body in bodies) == [[], [[0, 3]]]
    assert bodies[0]["seed"] == bodies[1]["seed"]
    for body in bodies:
        shown = letters_without(page) if "disabled_experts" in body else letters(page)
        assert "".join(shown.all_text_contents()) == answer_to(server, body)["text"]


def test_an_expert_can_be_silenced_while_the_text_is_written_and_stop_ends_both(
    reported_server: Server, open_page: OpenPage
) -> None:
    page = open_page(reported_server, settings(max_new_tokens=LONG)).page
    generate(page)
    wait_for_letters(page, 20)
    cell(page, 0, 0).click()
    expect(letters_without(page).nth(20)).to_be_attached(timeout=PATIENCE_MS)
    page.keyboard.press("Escape")
    expect_state(page, re.compile(r"^Stopped after \d+ tokens\.$"))
    reported_server.wait_for(requests_running=0)
    assert 20 <= letters(page).count() < LONG
    assert 20 <= letters_without(page).count() < LONG


def test_silenced_while_the_text_waits_for_its_turn_both_are_written_once_it_comes(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(server, settings(seed="")).page
    bodies = note_requests(page)
    held: list[Route] = []
    page.route("**/generate", lambda route: held.append(route), times=1)
    generate(page)
    expect_state(page, "Waiting for the first token …")
    cell(page, 2, 1).click()
    expect(cell(page, 2, 1)).to_have_attribute("aria-pressed", "true")
    expect_state(page, "Waiting for the first token …")  # Generate is not what the reader should press now
    (waiting,) = held
    waiting.continue_()
    expect_comparison(page)
    seed = int(page.locator("#used-seed").inner_text())
    assert [body.get("disabled_experts") for body in bodies] == [None, [[2, 1]]]
    for body, shown in zip(bodies, (letters(page), letters_without(page)), strict=True):
        assert "".join(shown.all_text_contents()) == answer_to(server, {**body, "seed": seed})["text"]


def test_a_link_restores_settings_layer_numbers_view_and_silence_and_makes_both_texts(
    reported_server: Server, open_page: OpenPage
) -> None:
    wish = "prompt=JULIET%3A&max_new_tokens=150&temperature=1.1&top_k=20&top_p=0.95&min_p=0.01"
    page = open_page(reported_server, wish).page
    generate(page)
    wait_until_done(page)
    cell(page, 1, 3).click()
    expect_comparison(page)
    cell(page, 2, 0).click()
    expect_comparison(page)
    choose_layer(page, 1)
    page.get_by_label("Numbers").check()
    page.get_by_role("radio", name="Cost").check()
    texts = [written(page), "".join(letters_without(page).all_text_contents())]
    page.get_by_role("button", name="Copy link").click()
    expect_state(page, "Copied.")
    link = page.evaluate("navigator.clipboard.readText()")

    other = open_page(reported_server).page
    other.goto(link)
    expect_state(other, "Ready.")
    fields = {"prompt": "JULIET:", "max_new_tokens": "150", "temperature": "1.1", "top_k": "20", "top_p": "0.95"}
    for name, value in {**fields, "min_p": "0.01"}.items():
        expect(other.locator(f"#{name}")).to_have_value(value)
    expect(other.locator("#layer-1")).to_be_checked()
    expect(other.get_by_label("Numbers")).to_be_checked()
    expect(other.get_by_role("radio", name="Cost")).to_be_checked()
    assert set(other.url.split("#")[1].split("&")) == set(link.split("#")[1].split("&"))
    for layer, expert in [(1, 3), (2, 0)]:
        expect(cell(other, layer, expert)).to_have_attribute("aria-pressed", "true")
    generate(other)
    expect_comparison(other)
    assert [written(other), "".join(letters_without(other).all_text_contents())] == texts


def test_a_link_that_silences_what_is_not_there_silences_nothing(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(silenced="9.0_0.9_x_1.2.3_-1.0")).page
    expect_state(page, "Ready.")
    expect(page.locator("#heat [aria-pressed=true]")).to_have_count(0)
    generate(page)
    wait_until_done(page)
    expect(page.locator("#text-without")).to_be_hidden()


def test_a_link_may_write_an_expert_with_leading_noughts(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(silenced="00.01_2.002")).page
    expect_state(page, "Ready.")
    for layer, expert in [(0, 1), (2, 2)]:
        expect(cell(page, layer, expert)).to_have_attribute("aria-pressed", "true")
    cell(page, 2, 2).click()
    expect(page.locator("#heat [aria-pressed=true]")).to_have_count(1)


def test_a_link_that_silences_too_many_is_refused_in_a_readers_words(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(silenced="1.0_1.1_1.2")).page
    generate(page)
    expect_state(page, "The silenced experts must leave at least 2 experts in every layer.")


def test_arrow_keys_walk_over_the_experts_and_enter_silences(reported_server: Server, open_page: OpenPage) -> None:
    page = open_page(reported_server, settings()).page
    generate(page)
    wait_until_done(page)
    assert page.locator("#heat button[tabindex='0']").count() == 1  # one stop for the tab key, not one for each
    cell(page, 0, 0).focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    expect(cell(page, 1, 1)).to_be_focused()
    expect(page.locator("#told")).to_contain_text("Expert 1 of layer 1: ")
    page.keyboard.press("Enter")
    expect_comparison(page)
    expect(cell(page, 1, 1)).to_have_attribute("aria-pressed", "true")
    expect(cell(page, 1, 1)).to_be_focused()


def test_the_events_of_the_silenced_text_never_name_the_expert(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).page
    bodies = note_requests(page)
    generate(page)
    wait_until_done(page)
    cell(page, 0, 1).click()
    expect_comparison(page)
    tokens = [data for name, data in server.events(**bodies[1]) if name == "token"]
    assert [token["text"] for token in tokens] == letters_without(page).all_text_contents()
    assert all(1 not in token["routed_experts"][0] for token in tokens)


def test_another_link_in_the_same_tab_is_a_page_of_its_own(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings(silenced="0.0")).page
    generate(page)
    expect_comparison(page)
    page.evaluate(f"location.hash = '{settings(prompt='JULIET:', layer=1)}'")
    expect(page.locator("#prompt")).to_have_value("JULIET:")
    expect(page.locator("#text-without")).to_be_hidden()
    expect(letters(page)).to_have_count(0)
    choose_layer(page, 2)
    assert "JULIET" in page.url
    assert "silenced" not in page.url


def test_after_another_link_there_is_no_text_to_stop_continue_or_repeat(
    reported_server: Server, open_page: OpenPage
) -> None:
    visit = open_page(reported_server, settings(max_new_tokens=30, prompt="é"))
    page = visit.page
    buttons = [page.get_by_role("button", name=name) for name in ("Stop", "Continue", "Same seed")]
    generate(page)
    wait_until_done(page)
    for button in buttons[1:]:
        expect(button).to_be_enabled()
    page.evaluate(f"location.hash = '{settings(max_new_tokens=LONG)}'")
    expect_state(page, "Ready.")
    for button in buttons:
        expect(button).to_be_disabled()
    for told in ("#folded:visible", "#spoken p"):  # nor anything told of it
        expect(page.locator(told)).to_have_count(0)

    generate(page)
    wait_for_letters(page, 20)
    expect(buttons[0]).to_be_enabled()
    page.evaluate(f"location.hash = '{settings(prompt='JULIET:')}'")
    expect_state(page, "Ready.")
    for button in buttons:
        expect(button).to_be_disabled()
    reported_server.wait_for(requests_running=0)
    assert visit.complaints == []
