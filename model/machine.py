"""What this process may really use of its machine: CPUs by affinity and cgroup, memory by cgroup.

A container with a quota of two CPUs on a host of 64 sees 64; a thread for each of them is many times slower than two.
One with a limit of 4 GiB sees all of the host's, and is killed when it takes more than its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cpus(root: Path = ROOT) -> int:
    """At least 1. A quota of 2.5 CPUs counts as 2: a thread that is throttled holds up all the others."""
    quota = cpu_quota(root)
    return visible_cpus() if quota is None else max(1, min(visible_cpus(), int(quota)))


def visible_cpus() -> int:
    """Whatever a quota says."""
    # macOS knows no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs granted by the tightest cgroup (v2 or v1) around this process; None where nothing limits it."""
    quotas = [quota for folder in _groups(root, "cpu") if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def usable_memory(root: Path = ROOT) -> int:
    """Bytes: the machine's, or the limit of the tightest cgroup around this process."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("memory.max", "memory.limit_in_bytes")  # of v2 and v1; "max" is no limit
    limits = [_read(folder / name).strip() for folder in _groups(root, "memory") for name in names]
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The process's own cgroup in every hierarchy that can limit what the controller is for, and all its ancestors."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        for name in (*group.relative_to("/").parents, group.relative_to("/")):
            for mount in (controllers, controller) if controllers else ("unified", "."):
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
        return path.read_text(errors="replace")
    except OSError:
        return ""
