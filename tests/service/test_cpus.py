"""A container's CPU quota bounds the number of threads, in both generations of cgroups."""

import os
from pathlib import Path

from service.cpus import cpu_quota, usable_cpus


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v2(root: Path, limit: str, group: str = "/") -> Path:
    return write(root, {"proc/self/cgroup": f"0::{group}\n", f"sys/fs/cgroup{group}/cpu.max": f"{limit}\n"})


def v1(root: Path, quota: str) -> Path:
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    return write(
        root,
        {
            "proc/self/cgroup": "3:cpuset:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
            f"{folder}/cpu.cfs_quota_us": quota,
            f"{folder}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuset/docker/abc/cpu.max": "1 1\n",
        },
    )


def test_quotas_of_both_generations_are_read(tmp_path: Path) -> None:
    assert cpu_quota(v2(tmp_path / "2", "250000 100000")) == 2.5
    assert cpu_quota(v1(tmp_path / "1", "50000\n")) == 0.5


def test_no_limit_is_no_quota(tmp_path: Path) -> None:
    for root in (v2(tmp_path / "2", "max 100000"), v1(tmp_path / "1", "-1\n"), tmp_path / "no cgroups"):
        assert cpu_quota(root) is None
        assert usable_cpus(root) == len(os.sched_getaffinity(0))


def test_an_ancestor_s_tighter_quota_counts(tmp_path: Path) -> None:
    v2(tmp_path, "400000 100000", "/pod/container")
    write(tmp_path, {"sys/fs/cgroup/pod/cpu.max": "100000 100000"})
    assert cpu_quota(tmp_path) == 1.0


def test_a_quota_is_rounded_down_but_never_to_nothing(tmp_path: Path) -> None:
    assert usable_cpus(v2(tmp_path / "half", "50000 100000")) == 1
    assert usable_cpus(v2(tmp_path / "one and a half", "150000 100000")) == 1
