"""Takes the README's picture of the page: ``python scripts/picture.py http://127.0.0.1:8000 docs/page.png``."""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import ViewportSize, expect, sync_playwright

SETTINGS = "#prompt=ROMEO%3A%0A&seed=7&max_new_tokens=700&layer=3"
SIZE = ViewportSize(width=1360, height=860)
UNTIL_DONE_MS = 120_000


def main(url: str, target: str) -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url + "/" + SETTINGS)
        page.get_by_role("button", name="Generate").click(timeout=UNTIL_DONE_MS)
        expect(page.locator("#stop")).to_be_enabled()
        expect(page.locator("#stop")).to_be_disabled(timeout=UNTIL_DONE_MS)
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
