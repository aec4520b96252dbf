"""`make serve` as a person has it: a terminal, an address that answers, Ctrl-C."""

import os
import pty
import re
import select
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CTRL_C = b"\x03"


class Terminal:
    """A command on a pseudo-terminal of its own, so that Ctrl-C reaches the whole process group as it does in life."""

    def __init__(self, *command: str) -> None:
        self.shown = ""
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.execvp(command[0], command)

    def wait_until_loaded(self, library: str, within_s: float) -> None:
        """Until the program that the command has started has mapped a file of that name."""
        deadline = time.monotonic() + within_s
        while library not in self._mapped():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _mapped(self) -> str:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        return "".join(Path(f"/proc/{child}/maps").read_text() for child in children)

    def type(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def read_until(self, pattern: str, within_s: float) -> re.Match[str]:
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.shown)):
            assert self._read_more(deadline), f"no {pattern!r} in:\n{self.shown}"
        return found

    def read_to_the_end(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while self._read_more(deadline):
            pass
        os.waitpid(self._pid, 0)

    def _read_more(self, deadline: float) -> bool:
        """False at the end of what the command says; asserts that it says it in time."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"silent for too long after:\n{self.shown}"
        try:
            chunk = os.read(self._screen, 65536)
        except OSError:  # Linux says so when the last process has let go of the terminal
            return False
        self.shown += chunk.decode(errors="replace")
        return bool(chunk)


@pytest.fixture
def served() -> Terminal:
    # This Python has the dependencies already; -o keeps make from installing them once more.
    return Terminal("make", "-o", ".venv/serve.stamp", "serve", f"PY={sys.executable}", "PORT=0")


def test_make_serve_prints_an_address_that_answers_and_ctrl_c_ends_it_without_an_error_line(served: Terminal) -> None:
    address = served.read_until(r"http://127\.0\.0\.1:\d+", within_s=60).group()
    with urllib.request.urlopen(f"{address}/livez", timeout=10) as answer:
        assert answer.status == 200
    served.type(CTRL_C)
    served.read_to_the_end(within_s=60)
    assert_no_error_line(served)


@pytest.mark.parametrize("imported", ["pydantic_core", "libtorch_cpu"])
def test_ctrl_c_while_it_still_imports_ends_it_without_an_error_line(served: Terminal, imported: str) -> None:
    served.wait_until_loaded(imported, within_s=60)
    served.type(CTRL_C)
    served.read_to_the_end(within_s=60)
    assert_no_error_line(served)


def assert_no_error_line(served: Terminal) -> None:
    assert not re.search(r"make: |Traceback|Error|Interrupt", served.shown), served.shown
