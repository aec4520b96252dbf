"""A training command as a process: its memory, its imports, its signals, what it says as it fails. Knows no command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

# glibc returns large blocks to the kernel at once and zeroes them again at the next step; keeping them makes training a
# fifth faster. The variables are read when a process starts, so training starts itself once more with them.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "134217728"}


def told(error: Exception) -> str | None:
    """One line for whoever asked; None for a fault of this program, which keeps its traceback."""
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more, so this ended"
    # Of a CPU's memory torch raises nothing more special.
    if isinstance(error, MemoryError) or any(said in str(error) for said in ("out of memory", "allocate memory")):
        return "there is not enough memory for this; a smaller batch_size, or a smaller model, needs less"
    return None if isinstance(error, RuntimeError) else " ".join(f"{error}".splitlines())


def give_up_output() -> None:
    """Python flushes once more as it ends, and would add two lines of its own on what it cannot write."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_patient_malloc(module: str) -> None:
    """Start the module, which this process runs, once more with MALLOC, unless it has been."""
    if not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **MALLOC})


def import_torch() -> None:
    """Meanwhile Ctrl-C ends the process at once: torch would swallow the exception, and lack numpy from then on."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    import_module("torch")
    signal.signal(signal.SIGINT, before)


def speaks_of(error: Exception) -> bool:
    """Under torchrun a machine's ranks refuse the same; its first says so. What befell one alone, that rank says."""
    if "LOCAL_RANK" not in os.environ:
        return True
    from training.parallel import FirstFailed, NoRanks, RankLost

    if isinstance(error, FirstFailed):
        return False
    own = RankLost | NoRanks | OSError | MemoryError | RuntimeError
    return os.environ["LOCAL_RANK"] == "0" or isinstance(error, own)


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes. A second signal interrupts at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
