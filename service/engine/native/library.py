"""Finds the compiled step, or compiles it: seconds, once for each source, flags and processor. Knows no torch."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from service.engine.processor import cpu_flags, cpu_model

SOURCE = Path(__file__).with_name("step.cpp")
BUILT = Path(__file__).with_name("built")
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
PORTABLE = "x86-64-v3"
"""For an image that is built on one machine and runs on others."""
PORTABLE_NEEDS = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
COMPILING_S = 120


class NoLibrary(Exception):
    """There is no compiled step here. One clause that says why."""


def load() -> ctypes.CDLL:
    """The compiled step: the one for this processor, or the portable one, or else compiled now. Raises NoLibrary."""
    try:
        source = SOURCE.read_text()  # once: an update in between would keep the new step under the old one's name
        # A virtual machine may hide what its model has.
        own, portable = (_built_for(each, source) for each in (f"native {cpu_model()} {sorted(cpu_flags())}", PORTABLE))
        if not own.exists() and not (portable.exists() and runs_portable()):
            compile_for("native", own, source)
        return ctypes.CDLL(str(own if own.exists() else portable))
    except OSError as error:  # a folder that this user may not enter, too
        raise NoLibrary(f"it does not load ({error})") from None


def compiler() -> str | None:
    """Where there is one: CXX, or else the usual names."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def compile_for(march: str, target: Path, source: str) -> None:
    """Compile for a processor as -march names it. A reader of the target never sees a half. Raises NoLibrary."""
    command = compiler()
    if command is None:
        raise NoLibrary("there is no C++ compiler here")
    try:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / target.name
            whole = [command, *FLAGS, f"-march={march}", "-o", str(output), "-x", "c++", "-"]
            # In English, of which the first error is told; and a message may have bytes of any encoding.
            speech: dict[str, Any] = {"env": {**os.environ, "LC_ALL": "C"}, "text": True, "errors": "replace"}
            subprocess.run(whole, input=source, check=True, capture_output=True, timeout=COMPILING_S, **speech)
            with output.open("rb") as library:
                os.fsync(library.fileno())  # a torn library would end every start, and not by an exception
            if not target.exists():  # who was first may have it mapped, on another machine of the same folder too
                output.replace(target)
    except subprocess.CalledProcessError as error:
        complaint = next((line for line in error.stderr.splitlines() if "error" in line), "it says nothing")
        raise NoLibrary(f"{command} cannot compile it ({complaint})") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"it cannot be compiled ({error})") from None


def _built_for(processor: str, source: str) -> Path:
    facts = (source, FLAGS, processor, sys.platform, platform.machine())
    return BUILT / f"step-{sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def runs_portable() -> bool:
    return cpu_flags() >= PORTABLE_NEEDS


def main() -> int:
    """``python -m service.engine.native.library``: compile the portable step, for an image."""
    try:
        source = SOURCE.read_text()
        compile_for(PORTABLE, _built_for(PORTABLE, source), source)
    except NoLibrary as reason:
        print(f"the native step is not compiled: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
