"""Takes the README's pictures of a running service's page: ``python scripts/picture.py http://127.0.0.1:8000 docs``.

``page.webp`` shows a text being written, then written again without an expert; ``page.png`` is that comparison at rest.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import FloatRect, Locator, Page, ViewportSize, expect, sync_playwright

SETTINGS = "#prompt=ROMEO%3A%0A&seed=7&max_new_tokens={length}&layer=5"
SILENCED = "Expert 1 of layer 5"
SIZE = ViewportSize(width=1360, height=860)
SMALL = ViewportSize(width=1240, height=850)
UNTIL_DONE_MS = 120_000
LENGTH = 300
TOKENS_A_FRAME = 5
FRAME_MS, PAUSE_MS, END_MS = 80, 1_800, 4_000

# A text comes faster than anybody could film it: the page's own stream is let through some events at a time.
FEED = """
const { fetch } = window;
let allowed = 0, wake = () => {};
window.feed = (count) => [allowed += count, wake()];
window.hold = () => (allowed = 0);
window.fetch = async (address, ...options) => {
  const response = await fetch(address, ...options);
  if (address !== "generate") return response;
  let rest = "";
  const gate = new TransformStream({
    async transform(chunk, stream) {
      const events = (rest + chunk).split("\\n\\n");
      rest = events.pop();
      for (const event of events) {
        while (allowed < 1) await new Promise((resolve) => (wake = resolve));
        allowed--;
        stream.enqueue(event + "\\n\\n");
      }
    },
  });
  const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(gate);
  return new Response(events.pipeThrough(new TextEncoderStream()));
};
"""


class Film:
    """Frames of a page down to the end of its grid, each with how long it stays."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._frames: list[Image.Image] = []
        self._times: list[int] = []

    def take(self, milliseconds: int, pointer: Locator | None = None) -> None:
        """pointer is drawn as a ring: screenshots have no mouse."""
        end = _box(self._page.locator("#heat"))
        clip = FloatRect(x=0, y=0, width=SMALL["width"], height=end["y"] + end["height"] + 12)
        frame = Image.open(io.BytesIO(self._page.screenshot(clip=clip))).convert("RGB")
        if pointer is not None:
            box = _box(pointer)
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            ImageDraw.Draw(frame).ellipse((x - 20, y - 20, x + 20, y + 20), outline="#8d2f10", width=4)
        self._frames.append(frame)
        self._times.append(milliseconds)

    def write(self, target: Path) -> None:
        """Without loss: flat colours and letters come out smaller so, and sharp."""
        first, *others = self._frames
        first.save(
            target,
            save_all=True,
            append_images=others,
            duration=self._times,
            loop=0,
            lossless=True,
            quality=60,
            minimize_size=True,
            method=4,  # Pillow takes 0 unless told, which stores what stays the same ten times over
        )


def _box(element: Locator) -> FloatRect:
    box = element.bounding_box()
    assert box
    return box


def _film(page: Page, url: str, target: Path) -> None:
    page.add_init_script(FEED)
    page.goto(url + "/" + SETTINGS.format(length=LENGTH))
    page.get_by_role("button", name="Generate").click(timeout=UNTIL_DONE_MS)
    page.locator(".figures").evaluate("figures => (figures.style.visibility = 'hidden')")  # a speed at the film's pace
    film = Film(page)
    expert = page.get_by_role("button", name=SILENCED, exact=True)
    for letters in ("#text .letter", "#text-without .letter"):
        for shown in range(TOKENS_A_FRAME, LENGTH + 1, TOKENS_A_FRAME):
            page.evaluate(f"feed({TOKENS_A_FRAME})")
            expect(page.locator(letters).nth(shown - 2)).to_be_attached(timeout=UNTIL_DONE_MS)
            film.take(FRAME_MS)
        page.evaluate("feed(9)")  # start and end take a place each
        expect(page.locator("#stop")).to_be_disabled(timeout=UNTIL_DONE_MS)
        if letters == "#text .letter":
            page.locator(letters).nth(30).hover()
            film.take(PAUSE_MS)
            page.mouse.move(0, 0)
            expert.hover()
            film.take(PAUSE_MS, pointer=expert)
            page.evaluate("hold()")
            expert.click()
    film.take(END_MS)
    film.write(target)


def _photograph(page: Page, url: str, target: Path) -> None:
    page.goto(url + "/" + SETTINGS.format(length=700))
    page.get_by_role("button", name="Generate").click(timeout=UNTIL_DONE_MS)
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled(timeout=UNTIL_DONE_MS)
    page.get_by_role("radio", name="Cost").check()
    page.get_by_role("button", name=SILENCED, exact=True).click()
    expect(page.locator("#verdict")).not_to_be_empty(timeout=UNTIL_DONE_MS)
    page.screenshot(path=target)


def main(url: str, folder: str) -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        _photograph(browser.new_page(viewport=SIZE, color_scheme="dark"), url, Path(folder, "page.png"))
        _film(browser.new_page(viewport=SMALL, color_scheme="light"), url, Path(folder, "page.webp"))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
