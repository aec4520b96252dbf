"""Servers for the tests of the edge: real processes on loopback ports with a tiny checkpoint of random weights; and the
native step, for those that need it."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch

from service.engine.native import library
from service.engine.native.library import NoLibrary
from tests.checkpoints import tiny_checkpoint
from tests.service.serving import FOR_EVER, Server

StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take a hundred times as long
    try:
        return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it as they found it."""
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "--checkpoint", checkpoint, "--slots", 4, "--threads", 1, "--max-new-tokens", FOR_EVER)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture
def start_server(checkpoint: Path, tmp_path: Path) -> Iterator[StartServer]:
    """Starts one with flags of the test's own; it is not waited for."""
    started: list[Server] = []

    def start(
        *flags: object,
        stdout: int | IO[str] = subprocess.PIPE,
        port: int | None = None,
        module: str = "service",
    ) -> Server:
        log = tmp_path / f"log-{len(started)}"
        flags = ("--checkpoint", checkpoint, "--threads", 1, "--max-new-tokens", FOR_EVER, *flags)
        started.append(Server(log, *flags, stdout=stdout, port=port, module=module))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@contextmanager
def skipped_without_a_compiler() -> Iterator[None]:
    try:
        yield
    except NoLibrary as missing:
        pytest.skip(f"no native step: {missing} (Debian: apt install g++)")


@pytest.fixture(scope="session")
def native_step() -> ctypes.CDLL:
    """As it is compiled where it runs."""
    with skipped_without_a_compiler():
        return library.load()


@pytest.fixture(scope="session")
def portable_step(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """As it is compiled for an image."""
    if not library.runs_portable():
        pytest.skip(f"the image's native step needs a processor with all of {library.PORTABLE}")
    target = tmp_path_factory.mktemp("built") / "step.so"
    with skipped_without_a_compiler():
        library.compile_for(library.PORTABLE, target, library.SOURCE.read_text())
    return ctypes.CDLL(str(target))
