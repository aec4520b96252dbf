"""How many CPUs this process may really use, affinity or cgroup quota, and how its threads shall share them.

A container with a quota of two CPUs on a host of 64 sees 64; a thread for each of them is many times slower than two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

SWITCH_INTERVAL_S: Final = 0.0005


def tune_process() -> None:
    """Has to come before anything imports torch."""
    # torch's threads spin while they wait for each other. For microseconds that pays (sleeping at once halves the speed
    # at one stream); for longer it takes the core from the event loop and from whoever else is there.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # the engine's thread holds the GIL for most of a step otherwise


def usable_cpus(root: Path = Path("/")) -> int:
    """At least 1. A quota of 2.5 CPUs counts as 2: a thread that is throttled holds up all the others."""
    quota = cpu_quota(root)
    # macOS knows no affinity.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs granted by the tightest cgroup (v2 or v1) around this process; None where nothing limits it."""
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The process's own cgroup in every hierarchy that can limit CPU time, and all of that group's ancestors."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        for name in (*group.relative_to("/").parents, group.relative_to("/")):
            for mount in (controllers, "cpu", "unified", "."):
                yield root / "sys/fs/cgroup" / mount / name


def _quota_of(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")  # v2: "200000 100000" or "max 100000"
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit()):  # "max", -1 or no such file: no limit here
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
