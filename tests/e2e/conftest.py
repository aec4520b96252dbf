"""A browser with a real server's page in it. Knows how a page misbehaves: on its console, or by asking strangers."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests import checkpoints
from tests.checkpoints import tiny_checkpoint
from tests.e2e.line import slow_line
from tests.service.serving import Server


@dataclass
class Visit:
    """One page, and what it did that a reader does not see."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)

    def hurry(self, times: int) -> Self:
        """Makes the page's time run faster, from a reload on; it notes for how long it wanted to wait."""
        self.page.add_init_script(
            f"""(() => {{
                const {{ setTimeout }} = window;
                const now = performance.now.bind(performance);
                window.waits = [];
                window.setTimeout = (step, ms) => [waits.push(ms), setTimeout(step, ms / {times})][1];
                performance.now = () => {times} * now();
            }})()"""
        )
        self.page.reload()
        return self

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):  # a violated policy shows up here as well
            self.complaints.append(message.text)

    def _on_request(self, request: Request) -> None:
        self.asked.append(request.url)


OpenPage = Callable[..., Visit]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "--checkpoint", checkpoint, "--slots", 4, "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def reported_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its checkpoint has a report on every expert, and it writes long texts."""
    folder = checkpoints.reported_checkpoint(tmp_path_factory.mktemp("checkpoints") / "reported")
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "--checkpoint", folder, "--slots", 4, "--threads", 1, "--max-new-tokens", 200_000)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture
def narrow_server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    """One place to write and one to wait; it is not waited for."""
    server = Server(tmp_path / "log", "--checkpoint", checkpoint, "--slots", 1, "--queue", 1, "--threads", 1)
    try:
        yield server
    finally:
        server.stop()


# Playwright runs an event loop in this thread for as long as it is open, and other modules run their own.
@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or request.getfixturevalue("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI often runs as root
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a server's page; `width` in pixels, what is behind the # as `settings`, over a slow line if `slowly`."""
    with ExitStack() as opened:
        context = opened.enter_context(browser.new_context(permissions=["clipboard-read", "clipboard-write"]))

        def open_page(
            server: Server, settings: str = "", width: int = 1280, path: str = "/", *, slowly: bool = False
        ) -> Visit:
            visit = Visit(context.new_page())
            visit.page.set_viewport_size({"width": width, "height": 800})
            url = opened.enter_context(slow_line(server.port)) if slowly else server.url
            visit.page.goto(f"{url}{path}#{settings}")
            return visit

        yield open_page
