"""The native step, for tests that decode with it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.engine.native import library
from service.engine.native.library import NoLibrary


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
        library.compile_for(library.PORTABLE, target)
    return ctypes.CDLL(str(target))
