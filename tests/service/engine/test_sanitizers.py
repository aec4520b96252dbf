"""The native step by itself touches only its own memory, computes nothing undefined, and its threads never race."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from service.engine.native import library
from service.engine.native.library import SOURCE
from tests.evidence import Evidence

DRIVER = Path(__file__).with_name("driver.cpp")
FLAGS = ("-std=c++20", "-g", "-O1", "-march=native", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-pthread")


def built(target: Path, *flags: str) -> Path:
    """A driver of the step, with sanitizers that this machine has. Skips where there are none."""
    compiler = library.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler on this machine (Debian: apt install g++)")
    command = [compiler, *FLAGS, *flags, f"-I{SOURCE.parent}", "-o", str(target)]
    empty = subprocess.run([*command, "-x", "c++", "-"], input="int main() {}", capture_output=True, text=True)
    if empty.returncode:
        pytest.skip(f"{compiler} has no {' '.join(flags)} on this machine")
    subprocess.run([*command, str(DRIVER)], check=True)
    return target


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_bursts_on_random_weights_are_clean_under_sanitizers(
    sanitizer: str, tmp_path: Path, evidence: Evidence
) -> None:
    driver = built(tmp_path / "driver", f"-fsanitize={sanitizer}")
    told = subprocess.run(
        [driver], capture_output=True, text=True, env=os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"}
    )
    assert told.returncode == 0, told.stderr + told.stdout
    tokens = re.match(r"\d+ tokens, the same", told.stdout)
    assert tokens, told.stdout
    assert told.stderr == ""
    evidence("told", told.stdout.strip())
