"""What a container grants bounds the number of threads and the memory, in both generations of cgroups."""

import os
from pathlib import Path

from model.machine import cpu_quota, usable_cpus, usable_memory


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


def test_the_tightest_memory_limit_counts_in_both_generations(tmp_path: Path) -> None:
    v2 = {
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/memory.max": "3000000\n",
        "sys/fs/cgroup/pod/memory.max": "2000000\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    assert usable_memory(write(tmp_path / "2", v2)) == 2_000_000
    v1 = {
        "proc/self/cgroup": "5:memory:/docker/abc\n4:cpuset:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",  # as a container sees its own
        "sys/fs/cgroup/cpuset/memory.max": "1\n",
    }
    assert usable_memory(write(tmp_path / "1", v1)) == 1_000_000


def test_without_a_limit_memory_is_the_machine_s(tmp_path: Path) -> None:
    machine = usable_memory(tmp_path)
    assert machine > 2**30
    unlimited = {"proc/self/cgroup": "5:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
    assert usable_memory(write(tmp_path / "1", unlimited)) == machine


def test_a_group_is_looked_up_in_the_hierarchy_that_it_is_of(tmp_path: Path) -> None:
    """Where both generations are mounted, /user is a group of each; and in a namespace the way may lead out of it."""
    both = {
        "proc/self/cgroup": "5:memory:/big\n0::/user\n",
        "sys/fs/cgroup/memory/big/memory.limit_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/user/memory.limit_in_bytes": "1000000\n",
    }
    assert usable_memory(write(tmp_path / "both", both)) == 3_000_000
    outside = {"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/memory.max": "2000000\n"}
    assert usable_memory(write(tmp_path / "outside", outside)) == 2_000_000


def test_a_name_in_another_encoding_is_no_failure(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": ""})
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/\xff\n")
    assert cpu_quota(tmp_path) is None
