"""Limits of control groups, read from made-up trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager.config.host import Cgroup, usable_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "0::/user.slice/job"


def test_v2_quota_is_the_tightest_of_the_group_and_those_above(tmp_path: Path) -> None:
    mount = tree(
        tmp_path,
        {"user.slice/job/cpu.max": "max 100000", "user.slice/cpu.max": "250000 100000", "cpu.max": "800000 100000"},
    )
    assert Cgroup(V2, mount).cpu_quota_cores() == 2.5


def test_v1_quota(tmp_path: Path) -> None:
    mount = tree(tmp_path, {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"})
    assert Cgroup("3:cpu,cpuacct:/job\n1:name=systemd:/", mount).cpu_quota_cores() == 1.5


def test_v1_quota_of_minus_one_is_none(tmp_path: Path) -> None:
    mount = tree(tmp_path, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"})
    assert Cgroup("3:cpu:/", mount).cpu_quota_cores() is None


@pytest.mark.parametrize("text", ["max 100000", "", "nonsense", "100000 0"])
def test_no_v2_quota(text: str, tmp_path: Path) -> None:
    assert Cgroup("0::/", tree(tmp_path, {"cpu.max": text})).cpu_quota_cores() is None


def test_v2_memory_limit_and_headroom_count_page_cache_as_free(tmp_path: Path) -> None:
    mount = tree(
        tmp_path,
        {
            "user.slice/job/memory.max": "max",
            "user.slice/job/memory.current": "900",
            "user.slice/memory.max": "1000",
            "user.slice/memory.current": "900",
            "user.slice/memory.stat": "anon 600\ninactive_file 300\nactive_file 0",
        },
    )
    assert Cgroup(V2, mount).memory_limit_bytes() == 1000
    assert Cgroup(V2, mount).memory_headroom_bytes() == 400


def test_v1_memory_limit_and_headroom(tmp_path: Path) -> None:
    mount = tree(
        tmp_path,
        {
            "memory/job/memory.limit_in_bytes": "1000",
            "memory/job/memory.usage_in_bytes": "700",
            "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 50",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "5",
        },
    )
    assert Cgroup("4:memory:/job", mount).memory_limit_bytes() == 1000
    assert Cgroup("4:memory:/job", mount).memory_headroom_bytes() == 350


def test_path_of_the_host_seen_from_inside_a_container_falls_back_to_the_mounts_root(tmp_path: Path) -> None:
    mount = tree(tmp_path, {"memory.max": "500", "memory.current": "100"})
    assert Cgroup("0::/docker/0123abcd", mount).memory_headroom_bytes() == 400


def test_path_above_the_mount_does_not_leave_it(tmp_path: Path) -> None:
    tree(tmp_path, {"memory.max": "7", "inner/memory.max": "500"})
    assert Cgroup("0::/../..", tmp_path / "inner").memory_limit_bytes() == 500


def test_no_cgroup_no_limits(tmp_path: Path) -> None:
    for cgroup in (Cgroup("", tmp_path), Cgroup("0::/", tmp_path)):
        assert cgroup.cpu_quota_cores() is None
        assert cgroup.memory_limit_bytes() is None
        assert cgroup.memory_headroom_bytes() is None


def test_usable_cores_are_the_affinity_or_the_quota_rounded_up(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert usable_cores(Cgroup("", tmp_path)) == affinity
    assert usable_cores(Cgroup("0::/", tree(tmp_path, {"cpu.max": "50000 100000"}))) == 1
    assert usable_cores(Cgroup("0::/", tree(tmp_path, {"cpu.max": f"{affinity * 200000} 100000"}))) == affinity


def test_this_process_can_be_asked() -> None:
    assert usable_cores() >= 1
