"""Claims and what was measured for them. Owns the fixtures `at` and `evidence`, `--prove` and docs/evidence.md.

A claim is a test that asks for `evidence`: small in `make test`, at full size in `make prove`, which runs claims only.
The page is written after every claim. A run of a part, or one that was broken off, renews its own lines and leaves the
others, each of which names the commit that it is from.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import pytest

from service.engine.processor import cpu_model
from tests.skips import skip_reason

ROOT = Path(__file__).parents[1]
T = TypeVar("T")


@dataclass(frozen=True)
class At:
    """`at(20, 200)` is 20 in `make test` and 200 in `make prove`."""

    full_size: bool

    def __call__(self, small: T, full: T) -> T:
        return full if self.full_size else small


Evidence = Callable[[str, object], None]


@pytest.fixture(scope="session")
def at(request: pytest.FixtureRequest) -> At:
    return At(full_size=request.config.getoption("--prove"))


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """`evidence("validation loss, nats per character", 1.3187)`: one measured value beside the test's claim."""

    def record(what: str, value: object) -> None:
        number = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
        request.node.user_properties.append(("evidence", f"{what}: {number}"))

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="run the claims only, each at full size, on a scoreboard")
    parser.addoption("--evidence", type=Path, metavar="FILE", help="with --prove: renew lines of FILE")


# After capture and terminal are set up: the scoreboard writes through pytest's own reporter.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--prove"):
        config.pluginmanager.register(Scoreboard(config))


@dataclass(frozen=True)
class Result:
    claim: str
    verdict: str  # proved, FAILED or skipped
    seconds: float
    measured: str


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Scoreboard:
    """One line per claim as it comes, and the same lines in a file."""

    config: pytest.Config
    claims: dict[str, str] = field(default_factory=dict)
    page: Page | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        claims = [item for item in items if "evidence" in getattr(item, "fixturenames", ())]
        self.claims = {item.nodeid: claim_of(item) for item in claims}
        path = self.config.getoption("--evidence")
        if path is not None:
            self.page = Page.read(path)
            if not (self.config.args_source is pytest.Config.ArgsSource.ARGS or self.config.getoption("keyword")):
                self.page.keep(self.claims.values())
        self.config.hook.pytest_deselected(items=[item for item in items if item not in claims])
        items[:] = claims

    # Ours replaces pytest's letter per test; failures keep their category and so their traceback at the end.
    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", report.outcome.upper()) if report.when == "call" or not report.passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._show(result_of(report, self.claims[report.nodeid]))

    def _show(self, result: Result) -> None:
        if self.page is not None:
            self.page.add(result)
        colour = {"proved": "green", "FAILED": "red"}.get(result.verdict, "yellow")
        terminal = self.config.get_terminal_writer()
        terminal.write(f"{result.verdict:<8}", **{colour: True})
        terminal.line(f"{result.seconds:7.1f} s  {result.claim}{' - ' * bool(result.measured)}{result.measured}")
        terminal.flush()


def claim_of(item: pytest.Item) -> str:
    """`test_a_kill_leaves_the_last_one[mid-write]` -> "a kill leaves the last one [mid-write]"."""
    name, bracket, case = item.name.removeprefix("test_").partition("[")
    return name.replace("_", " ") + (f" [{case}" if bracket else "")


def result_of(report: pytest.TestReport, claim: str) -> Result:
    verdict = {"passed": "proved", "failed": "FAILED", "skipped": "skipped"}[report.outcome]
    measured = [str(text) for key, text in report.user_properties if key == "evidence"]
    if report.skipped:
        measured.append(skip_reason(report))
    return Result(claim, verdict, report.duration, "; ".join(measured))


ROW = re.compile(r"\| (?:proved|FAILED|skipped) +\| (?P<claim>.*?) \| .* \| (?P<commit>[^|]*) \|")
RUN = re.compile(r"- (?P<commit>[^:]*): .*")


@dataclass
class Page:
    """The file: a line for each claim, and above them a line for each run that any of them is from."""

    path: Path
    runs: dict[str, str]  # commit -> its line
    rows: dict[str, str]  # claim -> its line

    @classmethod
    def read(cls, path: Path) -> Page:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        runs, rows = [[found for line in lines if (found := kind.fullmatch(line))] for kind in (RUN, ROW)]
        return cls(path, {run["commit"]: run[0] for run in runs}, {row["claim"]: row[0] for row in rows})

    def keep(self, claims: Iterable[str]) -> None:
        """In this order; what nobody claims any more goes."""
        self.rows = {cell(claim): self.rows.get(cell(claim), "") for claim in claims}

    def add(self, result: Result) -> None:
        at = commit()
        cells = (result.verdict, cell(result.claim), cell(result.measured), f"{result.seconds:.1f}", at)
        self.rows[cell(result.claim)] = f"| {' | '.join(cells)} |"
        self.runs[at] = f"- {at}: {circumstances()}"
        self.write()

    def write(self) -> None:
        rows = list(filter(None, self.rows.values()))
        used = {found["commit"] for row in rows if (found := ROW.fullmatch(row))}
        proved = sum(row.startswith("| proved") for row in rows)
        lines = [
            "# Evidence",
            "",
            f"Written by `make prove`: {proved} of the {len(rows)} claims below are proved. A run of some claims",
            "renews their lines, and each names its commit; a whole run has a line for every claim there is.",
            "",
            *(line for commit, line in self.runs.items() if commit in used),
            "",
            "| verdict | claim | measured | seconds | commit |",
            "|---|---|---|---:|---|",
            *rows,
            "",
        ]
        self.path.write_text("\n".join(lines), encoding="utf-8")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def circumstances() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    software = f"{platform.system()}, Python {platform.python_version()}, torch {version('torch')}"
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, {software}"


@cache
def commit() -> str:
    """Asked once: the page itself is a change that nobody has committed yet."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty= with uncommitted changes"]
    told = subprocess.run(git, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "not a git checkout"
