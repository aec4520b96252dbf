"""The native step, for tests that decode with it."""

from __future__ import annotations

import ctypes

import pytest

from service.engine.native import library
from service.engine.native.library import NoLibrary


@pytest.fixture(scope="session")
def native_step() -> ctypes.CDLL:
    """As it is compiled where it runs."""
    try:
        return library.load()
    except NoLibrary as missing:
        pytest.skip(f"no native step: {missing} (Debian: apt install g++)")


@pytest.fixture(scope="session")
def portable_step(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """As it is compiled for an image."""
    if not library.runs_portable():
        pytest.skip(f"this processor is no {library.PORTABLE}")
    target = tmp_path_factory.mktemp("built") / "step.so"
    try:
        library.compile_for(library.PORTABLE, target)
    except NoLibrary as missing:
        pytest.skip(f"no native step: {missing} (Debian: apt install g++)")
    return ctypes.CDLL(str(target))
