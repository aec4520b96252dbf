"""Tells Prometheus where this process's metrics are: one file for its file_sd. Knows no metric and no server."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TextIO

UNFINISHED_S: Final = 60


class TargetsRefused(Exception):
    """The folder cannot be written. One line."""


def announce(folder: Path | None, listener: socket.socket) -> Callable[[], None]:
    """Name the listener's address in the folder until the process ends or the answer is called; without one nothing.

    The file is there whole or not at all, and locked while this process lives. One that nobody has locked is of a
    process that was killed, and the next on the same machine removes it. Raises TargetsRefused.
    """
    if folder is None:
        return lambda: None
    try:
        withdraw = partial(_withdraw, *_write(folder, listener))
    except OSError as error:
        raise TargetsRefused(f"--targets {folder} cannot be written: {error.strerror}") from None
    atexit.register(withdraw)  # it holds the file, and closing that would end the lock
    return withdraw


def _withdraw(entry: Path, lock: TextIO) -> None:
    entry.unlink(missing_ok=True)
    lock.close()


def _write(folder: Path, listener: socket.socket) -> tuple[Path, TextIO]:
    """The entry, and its file with the lock."""
    machine, (host, port) = socket.gethostname(), listener.getsockname()[:2]
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder, machine)
    entry = folder / f"{machine}-{os.getpid()}-{port}.json"
    beside = entry.with_suffix(".new")
    file = beside.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump([{"targets": [f"{_reachable(host, machine)}:{port}"]}], file)
    file.flush()
    beside.chmod(0o644)  # Prometheus is another user
    beside.rename(entry)
    return entry, file


def _reachable(host: str, machine: str) -> str:
    """Every interface is no address to ask; the machine has a name on its network."""
    if host in ("0.0.0.0", "::"):
        return machine
    return f"[{host}]" if ":" in host else host


def _remove_stale(folder: Path, machine: str) -> None:
    """Those of this machine alone: not every file system shows the locks of another."""
    for path in folder.iterdir():
        if re.fullmatch(re.escape(machine) + r"-\d+-\d+\.(json|new)", path.name):
            with suppress(OSError), path.open("r+") as file:  # it is locked, or gone already; NFS locks what is written
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.suffix == ".json" or time.time() - path.stat().st_mtime > UNFINISHED_S:  # not locked at once
                    path.unlink()
