"""axe-core on the page in what states a reader meets it: it must find nothing serious."""

from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.e2e.conftest import OpenPage
from tests.e2e.reading import PATIENCE_MS, expect_state, generate, letters, settings, wait_until_done
from tests.service.serving import Server

GRAVE = ("serious", "critical")


def grave_findings(page: Page) -> list[tuple[str, str, list[Any]]]:
    violations = Axe().run(page).response["violations"]
    return [
        (each["id"], each["impact"], [node["html"][:200] for node in each["nodes"][:3]])
        for each in violations
        if each["impact"] in GRAVE
    ]


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_from_the_empty_page_to_a_comparison(
    reported_server: Server, open_page: OpenPage, scheme: Literal["light", "dark"], width: int
) -> None:
    page = open_page(reported_server, settings(max_new_tokens=80), width=width).page
    page.emulate_media(color_scheme=scheme)
    expect_state(page, "Ready.")
    assert grave_findings(page) == []

    page.locator("#settings").evaluate("settings => settings.open = true")
    generate(page)
    wait_until_done(page)
    page.get_by_role("button", name="Copy as Python").click()
    letters(page).nth(30).hover()
    expect(page.locator("#card")).to_be_visible()
    assert grave_findings(page) == []

    page.get_by_label("Numbers").check()
    page.get_by_role("button", name="Expert 1 of layer 2", exact=True).click()
    expect(page.locator("#verdict")).not_to_be_empty(timeout=PATIENCE_MS)
    for view in ("Server", "Cost", "Likes"):
        page.get_by_role("radio", name=view).check()
        assert grave_findings(page) == []


def test_axe_finds_what_is_wrong_when_something_is(reported_server: Server, open_page: OpenPage) -> None:
    page = open_page(reported_server).page
    expect_state(page, "Ready.")
    page.evaluate("document.querySelector('label[for=prompt]').remove(); document.body.style.color = '#bbb'")
    assert {found for found, _, _ in grave_findings(page)} >= {"color-contrast"}


def test_no_motion_for_a_reader_who_wants_none(reported_server: Server, open_page: OpenPage) -> None:
    page = open_page(reported_server, settings(max_new_tokens=200_000)).page
    page.emulate_media(reduced_motion="reduce")
    generate(page)
    expect_state(page, "Writing …")
    moving = "document.getAnimations().length + document.querySelectorAll('.writing').length"
    assert page.evaluate(f"[document.getAnimations().length, {moving}]") == [0, 1]
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate("document.getAnimations().length") > 0
    page.keyboard.press("Escape")
