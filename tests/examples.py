"""The examples of our pages: found, run against a real server, and compared with what the page says they print."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.service.serving import Server

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
ANYTHING = "…"


@dataclass(frozen=True)
class Example:
    """A block of a page, and what the page shows right below it as its output."""

    line: int
    language: str
    code: str
    output: str | None

    def run(self, port: int) -> str:
        """What it prints, on another port than the page's."""
        if self.language == "sh" and not (shutil.which("bash") and shutil.which("curl")):
            pytest.skip("no bash or no curl on this machine")
        command = {"sh": ["bash", "-c"], "python": [sys.executable, "-c"]}[self.language]
        code = self.code.replace(":8000", f":{port}")
        done = subprocess.run([*command, code], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shows(self, printed: str) -> bool:
        """But for spaces and line ends, and for what is left out."""
        assert self.output is not None
        shown, printed = ("".join(text.split()) for text in (self.output, printed))
        return re.fullmatch(".*".join(map(re.escape, shown.split(ANYTHING))), printed) is not None


def examples_of(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```(sh|python)\n(.*?)^```\n(?:```output\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE)
    return [Example(1 + text.count("\n", 0, block.start()), *block.groups()) for block in blocks]


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve` serves, for the examples that a newcomer types."""
    # One thread: two that wait for each other on a busy machine take ten times as long.
    server = Server(tmp_path_factory.mktemp("shipped") / "log", "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()
