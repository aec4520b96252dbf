"""Tests run in several processes at once; one that compares times is marked `alone` and has the machine to itself."""

import fcntl
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

FOLDER = "FOLDER_OF_LOCKS"  # for the processes that the first one starts


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        os.environ[FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    folder = Path(os.environ[FOLDER])
    kind = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        # Who waits for the room keeps the door, or others who share it would come in for ever.
        with locked(door, fcntl.LOCK_EX):
            fcntl.flock(room, kind)
        return (yield)


@contextmanager
def locked(file: TextIO, kind: int) -> Iterator[None]:
    fcntl.flock(file, kind)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
