"""Training in a container with one CPU and 600 MiB: real cgroups, where this process may make them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.training.processes import ROOT

CGROUPS = Path("/sys/fs/cgroup")
ONE_CPU, SOME_MEMORY = "100000", str(600 * 2**20)


@pytest.fixture
def container() -> Iterator[list[Path]]:
    """Groups for a process to join; of the first generation each controller has its own."""
    name = f"test-{uuid4()}"
    if (CGROUPS / "memory").is_dir():
        limits = {
            CGROUPS / "cpu" / name / "cpu.cfs_quota_us": ONE_CPU,
            CGROUPS / "memory" / name / "memory.limit_in_bytes": SOME_MEMORY,
        }
    else:
        limits = {CGROUPS / name / "cpu.max": f"{ONE_CPU} 100000", CGROUPS / name / "memory.max": SOME_MEMORY}
    groups = sorted({limit.parent for limit in limits})
    try:
        for group in groups:
            group.mkdir()
        for limit, value in limits.items():
            limit.write_text(value)
        yield groups
    except OSError as error:
        pytest.skip(f"no cgroup can be made here, which takes root and a writable {CGROUPS}: {error}")
    finally:
        for group in groups:
            if group.exists():
                group.rmdir()


def training_in(groups: list[Path], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    join = "".join(f"echo $$ > {group}/cgroup.procs && " for group in groups)
    return subprocess.run(
        ["sh", "-c", f'{join}exec "$@"', "sh", sys.executable, "-m", "training", *arguments],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_there_are_as_many_threads_as_cpus_granted_unless_told_otherwise(container: list[Path]) -> None:
    for told in ({}, {"OMP_NUM_THREADS": "3"}):
        ran = training_in(container, "sample", "ROMEO:", "--length", "1", OMP_DISPLAY_ENV="TRUE", **told)
        assert ran.returncode == 0, ran.stderr
        assert f"OMP_NUM_THREADS = '{told.get('OMP_NUM_THREADS', 1)}'" in ran.stderr


def test_what_the_container_has_no_memory_for_is_refused(container: list[Path]) -> None:
    ran = training_in(container, "train", "--preset", "quick", "--batch-size", "6400", "--run", f"test-{uuid4()}")
    assert ran.returncode == 1
    assert "and there are 0.6; lower batch_size (6400)" in ran.stderr
