"""What any test may ask for beside its scale and a place for its evidence: the corpus, a browser."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

    from training.corpora import Corpus

# Before anything imports torch: the models here are too small to share between threads, and the spinning threads of a
# test and of the servers that it starts would only keep each other waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test ARGS=...` hands its own arguments to every make below it.
for inherited in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(inherited, None)

# What a shell starts in the background ignores Ctrl-C, and so would every program that a test starts and ends by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.alone", "tests.skips", "tests.evidence", "tests.examples"]


def pytest_configure(config: pytest.Config) -> None:
    # The same examples on every run, no matter how busy the machine; a proof looks further.
    full = config.getoption("--prove")
    settings.register_profile("moescope", deadline=None, derandomize=not full, max_examples=1000 if full else 50)
    settings.load_profile("moescope")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the engine runs on."""
    import torch

    return torch.device(request.param)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Tiny Shakespeare: 1,003,854 characters in `train`, 111,540 in `validation`."""
    from training import corpora  # here, so that tests of the service never import training

    try:
        return corpora.load("tinyshakespeare")
    except corpora.CorpusUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium to drive with Playwright's `executable_path`."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    return path
