"""What a reader does on the page, and what a reader sees there."""

import re
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, expect

from tests.service.serving import PATIENCE_S

PATIENCE_MS = PATIENCE_S * 1000
LONG = 200_000  # for a text that is still being written when the test acts, on any machine
NUM_TOKENS = 200


def settings(**values: object) -> str:
    return urlencode({"prompt": "ROMEO:", "max_new_tokens": NUM_TOKENS, "seed": 7, **values})


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def wait_until_done(page: Page) -> None:
    expect_state(page, "Done.")


def expect_state(page: Page, words: str | re.Pattern[str]) -> None:
    expect(page.locator("#state")).to_have_text(words, timeout=PATIENCE_MS)


def letters(page: Page) -> Locator:
    return page.locator("#text .letter")


def wait_for_letters(page: Page, count: int) -> None:
    expect(letters(page).nth(count - 1)).to_be_attached(timeout=PATIENCE_MS)


def written(page: Page) -> str:
    return "".join(letters(page).all_text_contents())


def top_experts(tokens: list[dict[str, Any]], layer: int) -> list[int]:
    weighted = ((token["expert_weights"][layer], token["routed_experts"][layer]) for token in tokens)
    return [experts[weights.index(max(weights))] for weights, experts in weighted]


def tints(letters_or_legend: Locator) -> list[str]:
    colours: list[str] = letters_or_legend.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    return colours


def choose_layer(page: Page, layer: int) -> None:
    page.get_by_role("group", name="Layer").get_by_role("radio", name=str(layer), exact=True).check()
