"""Claims and what was measured for them. Owns the fixtures `at` and `evidence`, `--prove` and docs/evidence.md.

A claim is a test that asks for `evidence`: small in `make test`, at full size in `make prove`, which runs claims only.
"""

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
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
    parser.addoption("--evidence", type=Path, metavar="FILE", help="with --prove: write what was measured to FILE")


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
    """One line per claim as it comes, and the same lines as a file at the end."""

    config: pytest.Config
    claims: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        claims = [item for item in items if "evidence" in getattr(item, "fixturenames", ())]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in claims])
        items[:] = claims
        self.claims = {item.nodeid: claim_of(item) for item in items}

    # Ours replaces pytest's letter per test; failures keep their category and so their traceback at the end.
    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", report.outcome.upper()) if report.when == "call" or not report.passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._show(result_of(report, self.claims[report.nodeid]))

    def _show(self, result: Result) -> None:
        self.results.append(result)
        colour = {"proved": "green", "FAILED": "red"}.get(result.verdict, "yellow")
        terminal = self.config.get_terminal_writer()
        terminal.write(f"{result.verdict:<8}", **{colour: True})
        terminal.line(f"{result.seconds:7.1f} s  {result.claim}{' - ' * bool(result.measured)}{result.measured}")
        terminal.flush()

    def pytest_sessionfinish(self) -> None:
        path = self.config.getoption("--evidence")
        if path is not None:
            path.write_text(evidence_page(self.results), encoding="utf-8")


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


def evidence_page(results: list[Result]) -> str:
    rows = [f"| {r.verdict} | {cell(r.claim)} | {cell(r.measured)} | {r.seconds:.1f} |" for r in results]
    proved = sum(result.verdict == "proved" for result in results)
    return "\n".join(
        [
            "# Evidence",
            "",
            f"Written by `make prove`: {proved} of {len(results)} claims proved.",
            "",
            *(f"- {name}: {value}" for name, value in circumstances().items()),
            "",
            "| verdict | claim | measured | seconds |",
            "|---|---|---|---:|",
            *rows,
            "",
        ]
    )


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def circumstances() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "software": f"{platform.system()}, Python {platform.python_version()}, torch {version('torch')}",
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty= with uncommitted changes"]
    told = subprocess.run(git, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "not a git checkout"
