"""A text on the page outlives its server: killed, stopped, frozen, damaged on the way, or replaced by another."""

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.checkpoints import tiny_checkpoint
from tests.e2e.conftest import OpenPage
from tests.e2e.reading import (
    PATIENCE_MS,
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
from tests.evidence import At, Evidence
from tests.service.serving import Server, free_port

PICKING_UP = re.compile(r"^The connection was lost after \d+ tokens; picking it up again …$")

Serve = Callable[..., Server]


@pytest.fixture
def serve(checkpoint: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts a server; each comes to the same address, where the one before must be gone."""
    port, servers = free_port(), list[Server]()

    def serve(*flags: object, folder: Path = checkpoint) -> Server:
        log = tmp_path / f"log-{len(servers)}"
        flags = ("--checkpoint", folder, "--slots", 4, "--threads", 1, *flags)
        servers.append(Server(log, *flags, port=port))
        return servers[-1].wait_until_ready()

    try:
        yield serve
    finally:
        for server in servers:
            server.stop()


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def pauses(page: Page) -> list[int]:
    """Between two tries; a minute is what it listens to silence."""
    return [wait for wait in page.evaluate("waits") if wait < 60_000]


def tokens_alone(server: Server, page: Page, num_tokens: int) -> list[dict[str, Any]]:
    """What the server writes to the page's request when nothing happens to it."""
    seed = int(page.locator("#used-seed").inner_text())
    events = server.events(max_new_tokens=num_tokens, seed=seed, return_routed_experts=True)
    return [data for name, data in events if name == "token"]


def assert_letters(page: Page, tokens: list[dict[str, Any]]) -> None:
    """Every letter stands once and in its place, with its number and tint in every layer; the reader aloud agrees."""
    assert letters(page).evaluate_all("all => all.map(one => Number(one.dataset.index))") == list(range(len(tokens)))
    assert letters(page).all_text_contents() == [token["text"] for token in tokens]
    assert "".join(page.locator("#spoken p").all_text_contents()) == written(page)
    legend = tints(page.locator("#legend li"))
    for layer in range(len(tokens[0]["routed_experts"])):
        choose_layer(page, layer)
        expected = top_experts(tokens, layer)
        assert letters(page).evaluate_all("all => all.map(one => Number(one.dataset.expert))") == expected
        assert tints(letters(page)) == [legend[expert] for expert in expected]


def assert_heatmap(page: Page, tokens: list[dict[str, Any]]) -> None:
    for layer, row in enumerate(page.locator("#heat tbody tr").all()):
        counts = Counter(expert for token in tokens for expert in token["routed_experts"][layer])
        shares = [100 * counts[expert] / counts.total() for expert in range(row.locator("td").count())]
        assert [int(cell or 0) for cell in row.locator("td").all_text_contents()] == pytest.approx(shares, abs=0.501)


def test_a_text_on_the_page_outlives_its_killed_server_to_the_letter(
    serve: Serve, open_page: OpenPage, at: At, evidence: Evidence
) -> None:
    num_kills, num_tokens = at(1, 5), at(2000, 4000)
    moments = sorted(random.Random(6).sample(range(20, num_tokens - 1000), num_kills))  # the last may be on their way
    server = serve()
    page = open_page(server, settings(max_new_tokens=num_tokens, seed=""), slowly=True).page
    generate(page)
    for moment in moments:
        wait_for_letters(page, moment)
        kill(server)
        expect_state(page, PICKING_UP)
        server = serve()
    wait_until_done(page)

    tokens = tokens_alone(server, page, num_tokens)
    shown = letters(page).evaluate_all("all => all.map(one => [Number(one.dataset.index), one.textContent])")
    indexes = {index for index, _ in shown}
    evidence("kills of the server within one text", num_kills)
    evidence("letters lost", len(tokens) - len(indexes))
    evidence("letters doubled", len(shown) - len(indexes))
    evidence("letters different", sum(tokens[index]["text"] != text for index, text in shown))
    assert_letters(page, tokens)


def test_after_a_shutdown_the_figures_go_on_where_they_were(serve: Serve, open_page: OpenPage) -> None:
    server = serve("--grace-s", 0)
    page = open_page(server, settings(max_new_tokens=4096), slowly=True).page
    generate(page)
    wait_for_letters(page, 100)
    began = page.evaluate("performance.now()")
    server.signal(signal.SIGTERM)
    expect_state(page, PICKING_UP)
    expect(page.locator("#rate")).to_have_text("–")
    first_token, num_letters = page.locator("#ttft").inner_text(), letters(page).count()
    assert server.exit_code() == 0

    server = serve()
    wait_for_letters(page, num_letters + 200)
    expect_state(page, "Writing …")
    seconds = (page.evaluate("performance.now()") - began) / 1000
    page.keyboard.press("Escape")
    speed = int(page.locator("#rate").inner_text().split()[0])
    assert speed > letters(page).count() / seconds  # with the gap as writing it would be less
    assert page.locator("#ttft").inner_text() == first_token
    tokens = tokens_alone(server, page, letters(page).count())
    assert_letters(page, tokens)
    assert_heatmap(page, tokens)


@pytest.mark.parametrize("how", ["button", "escape"])
def test_the_waiting_for_a_server_can_be_stopped(serve: Serve, open_page: OpenPage, how: str) -> None:
    server = serve()
    visit = open_page(server, settings(max_new_tokens=4096), slowly=True).hurry(times=20)
    page = visit.page
    generate(page)
    wait_for_letters(page, 50)
    kill(server)
    expect_state(page, PICKING_UP)
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    num_letters, num_asked = letters(page).count(), len(visit.asked)
    expect_state(page, f"Stopped after {num_letters} tokens.")
    serve()  # which takes longer than any pause of a page in a hurry
    expect_state(page, f"Stopped after {num_letters} tokens.")
    assert len(visit.asked) == num_asked
    generate(page)
    expect_state(page, "Writing …")


def test_a_server_with_another_model_cannot_go_on(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    server = serve()
    page = open_page(server, settings(max_new_tokens=4096), slowly=True).page
    generate(page)
    wait_for_letters(page, 50)
    kill(server)
    expect_state(page, PICKING_UP)
    num_letters = letters(page).count()
    serve(folder=tiny_checkpoint(tmp_path / "another", seed=1))
    words = "The server that came back would write another text. What arrived is kept."
    expect_state(page, f"The connection was lost after {num_letters} tokens. {words}")
    assert letters(page).count() == num_letters
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_a_page_that_finds_another_model_behind_it_is_built_anew(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    server = serve()
    page = open_page(server, settings()).page
    generate(page)
    wait_until_done(page)
    kill(server)
    serve(folder=tiny_checkpoint(tmp_path / "another", num_layers=1, num_experts=6))
    generate(page)
    expect(page.locator("#heat tbody tr")).to_have_count(1, timeout=PATIENCE_MS)
    expect(page.locator("#heat thead th")).to_have_count(1 + 6)
    expect_state(page, "Ready.")
    generate(page)
    wait_until_done(page)


def test_after_two_minutes_it_gives_up_and_keeps_the_text(serve: Serve, open_page: OpenPage) -> None:
    server = serve()
    page = open_page(server, settings(max_new_tokens=4096), slowly=True).hurry(times=20).page
    generate(page)
    wait_for_letters(page, 50)
    kill(server)
    words = r"It could not be picked up again for two minutes\. What arrived is kept\."
    expect_state(page, re.compile(rf"^The connection was lost after \d+ tokens\. {words}$"))
    assert pauses(page)[:6] == [500, 1000, 2000, 4000, 5000, 5000]
    assert 60_000 < sum(pauses(page)) <= 125_000  # what the tries themselves take comes on top
    assert letters(page).count() >= 50


def test_a_server_that_falls_silent_is_asked_again(serve: Serve, open_page: OpenPage) -> None:
    server = serve()
    page = open_page(server, settings(max_new_tokens=2000), slowly=True).hurry(times=6).page
    generate(page)
    wait_for_letters(page, 50)
    server.signal(signal.SIGSTOP)  # its connections stay open
    expect_state(page, PICKING_UP)
    server.signal(signal.SIGCONT)
    wait_until_done(page)
    assert_letters(page, tokens_alone(server, page, 2000))


# Below, what the server really wrote is damaged on its way to the page.


# What follows on 50 good tokens, from the last of them and the events that should come next.
Damage = Callable[[str, list[str]], list[str]]


def ends_in_error(code: str) -> Damage:
    event = f'event: error\ndata: {{"error": {{"message": "the test broke it"}}, "code": "{code}"}}\n\n'
    return lambda last, rest: [event]


def just_ends(last: str, rest: list[str]) -> list[str]:
    return []


DAMAGES: dict[str, Damage] = {
    "it ends between two events": just_ends,
    "it ends within an event": lambda _, rest: [rest[0][:60]],
    "an event is garbled": lambda _, rest: [rest[0].replace("{", "["), *rest[1:]],
    "a token is missing": lambda _, rest: rest[1:],
    "a token comes twice": lambda last, rest: [last, *rest],
    "it ends in shutdown": ends_in_error("shutdown"),
    "it ends in internal": ends_in_error("internal"),
    "it ends in stalled": ends_in_error("stalled"),
}


class Interference:
    """Stands between page and server: damages the first stream, gives the answers it is told, then lets all pass."""

    def __init__(self, page: Page, server: Server, damage: Damage, *answers: dict[str, Any]) -> None:
        stream = server.generate(max_new_tokens=200, seed=7, return_routed_experts=True).text
        events = [f"{event}\n\n" for event in stream.removesuffix("\n\n").split("\n\n")]
        good, rest = events[:51], events[51:]  # the start and 50 tokens
        damaged = "".join([*good, *damage(good[-1], rest)])
        self.last_id = good[-1].split("\n")[0].removeprefix("id: ")
        self.asked: list[tuple[str | None, int]] = []
        self._answers = [{"body": damaged, "content_type": "text/event-stream"}, *answers]
        page.route("**/generate", self._handle)

    def _handle(self, route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        self.asked.append((route.request.headers.get("last-event-id"), body["seed"]))
        if self._answers:
            route.fulfill(**self._answers.pop(0))
        else:
            route.continue_()


def refusal(status: int, **headers: str) -> dict[str, Any]:
    body = '{"error": {"message": "the test refuses it"}}'
    return {"status": status, "headers": headers, "content_type": "application/json", "body": body}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stream_goes_on_after_its_last_good_event(server: Server, open_page: OpenPage, damage: str) -> None:
    page = open_page(server, settings()).page
    interference = Interference(page, server, DAMAGES[damage])
    generate(page)
    expect_state(page, "The connection was lost after 50 tokens; picking it up again …")
    wait_until_done(page)
    assert interference.asked == [(None, 7), (interference.last_id, 7)]
    assert_letters(page, tokens_alone(server, page, 200))


def test_a_failure_that_would_come_again_ends_the_text(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).hurry(times=20).page
    interference = Interference(page, server, ends_in_error("non_finite"))
    generate(page)
    expect_state(page, "The test broke it. The text ends here.")
    assert len(interference.asked) == 1


def test_a_refusal_that_would_come_again_ends_the_text_in_words(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).hurry(times=20).page
    interference = Interference(page, server, just_ends, refusal(403))
    generate(page)
    expect_state(page, "The connection was lost after 50 tokens. The test refuses it. What arrived is kept.")
    assert letters(page).count() == 50
    assert len(interference.asked) == 2


def test_it_asks_again_when_the_server_says_but_within_ten_seconds(server: Server, open_page: OpenPage) -> None:
    page = open_page(server, settings()).hurry(times=5).page
    answers = [refusal(429, **{"Retry-After": "7"}), refusal(503, **{"Retry-After": "60"}), refusal(502)]
    interference = Interference(page, server, just_ends, *answers)
    generate(page)
    wait_until_done(page)
    assert pauses(page) == [500, 7_000, 10_000, 4_000]
    assert interference.asked[1:] == [(interference.last_id, 7)] * 4
    assert_letters(page, tokens_alone(server, page, 200))
