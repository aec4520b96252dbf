"""The API reference in a browser: all of it comes from here, within the policy, and what it sends is answered."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import OpenPage
from tests.service.serving import Server

KEY = "a-key"


@pytest.fixture
def locked(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "log", "--checkpoint", checkpoint, "--threads", 1, "--api-key", KEY)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def generate_block(page: Page) -> Locator:
    return page.locator(".opblock-post").filter(has=page.locator("[data-path='/generate']"))


def try_it_out(page: Page) -> Locator:
    """With the example that the schema gives; what came back."""
    block = generate_block(page)
    block.locator(".opblock-summary").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    return block.locator(".live-responses-table")


def test_the_reference_is_offline_within_the_policy_and_what_it_sends_is_answered(
    server: Server, open_page: OpenPage
) -> None:
    visit = open_page(server, path="/docs")
    expect(generate_block(visit.page)).to_be_visible()
    expect(visit.page.locator("#ask")).to_be_hidden()
    expect(try_it_out(visit.page)).to_contain_text("event: done")
    assert visit.complaints == []
    assert visit.asked
    assert [url for url in visit.asked if not url.startswith((f"{server.url}/", "data:"))] == []


def test_behind_a_path_prefix_it_asks_beneath_the_prefix_only(server: Server, open_page: OpenPage) -> None:
    visit = open_page(server, path="/docs")
    visit.page.route(
        "**/under/here/**",
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/under/here", ""))),
    )
    visit.page.goto("about:blank")
    visit.asked.clear()
    visit.page.goto(f"{server.url}/under/here/docs")
    expect(try_it_out(visit.page)).to_contain_text("event: done")
    assert [url for url in visit.asked if not url.startswith((f"{server.url}/under/here/", "data:"))] == []


def test_a_server_with_a_key_is_asked_once_the_reader_has_given_it(locked: Server, open_page: OpenPage) -> None:
    visit = open_page(locked, path="/docs")
    visit.page.get_by_label("This server's API key").fill("ключ")  # which no header can carry
    visit.page.get_by_role("button", name="Show the reference").click()
    assert not visit.page.locator("#key").evaluate("key => key.checkValidity()")
    expect(visit.page.locator("#ask")).to_be_visible()
    visit.page.get_by_label("This server's API key").fill("wrong")
    visit.page.get_by_role("button", name="Show the reference").click()
    expect(visit.page.get_by_role("status")).to_contain_text("key")
    visit.page.get_by_label("This server's API key").fill(KEY)
    visit.page.get_by_role("button", name="Show the reference").click()
    expect(try_it_out(visit.page)).to_contain_text("event: done")
    expect(visit.page.locator("#ask")).to_be_hidden()
    # The browser itself reports the two answers without the key; nothing else is wrong.
    assert all("401" in complaint for complaint in visit.complaints)
