"""The doctor's probes on the real host: that they work, bound what they do, and leave nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stager.config import StagerConfig
from stager.doctor import Status, probes, run_checks, target_probe
from stager.doctor.target_probe import MAX_PROBE_BYTES, existing_directory, probe_target


def clock_that_jumps(secs: float) -> Callable[[], float]:
    """Each look at it is ``secs`` later."""
    now = iter(range(10**9))
    return lambda: next(now) * secs


def test_probe_writes_its_file_measures_and_removes_it(tmp_path: Path) -> None:
    facts = probe_target(str(tmp_path))
    assert (facts.problem, facts.lock_problem, facts.exists) == (None, None, True)
    assert 0 < facts.nbytes <= MAX_PROBE_BYTES
    assert facts.secs > 0
    assert os.listdir(tmp_path) == []


def test_probe_of_a_directory_that_does_not_exist_tries_the_one_above_and_makes_nothing(tmp_path: Path) -> None:
    facts = probe_target(str(tmp_path / "a" / "b"))
    assert (facts.problem, facts.exists, facts.directory) == (None, False, os.path.realpath(tmp_path))
    assert os.listdir(tmp_path) == []


def test_probe_stops_early_on_a_slow_disk(tmp_path: Path) -> None:
    facts = probe_target(str(tmp_path), clock_that_jumps(target_probe.MAX_PROBE_SECS * 2))
    assert facts.nbytes == target_probe._CHUNK_BYTES


def test_probe_takes_at_most_a_tenth_of_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_blocks = 100
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((1, 1000, free_blocks, free_blocks, free_blocks, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    assert probe_target(str(tmp_path)).nbytes == 10_000


FAILING_CALLS = {
    "open": "cannot create a file",
    "write": "cannot write",
    "fsync": "cannot fsync",
    "rename": "cannot rename",
}


@pytest.mark.parametrize("call", FAILING_CALLS)
def test_probe_says_which_step_failed_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, call, fail)
    assert probe_target(str(tmp_path)).problem == f"{FAILING_CALLS[call]}: {os.strerror(errno.EDQUOT)}"
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_probe_reports_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    facts = probe_target(str(tmp_path))
    assert (facts.problem, facts.lock_problem) == (None, "fails: No locks available")


def test_existing_directory_climbs_past_files_and_missing_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert existing_directory(str(tmp_path / "file" / "x")) == os.path.realpath(tmp_path)


def test_kernel_probes_pass_here_and_leak_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (probes.try_memfd, probes.try_populate_write, probes.try_descriptor_passing, probes.try_pidfd):
        assert attempt() is None, attempt.__name__
    assert len(os.listdir("/proc/self/fd")) == before


def test_kernel_probe_reports_what_the_kernel_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert probes.try_memfd() == "fails: Operation not permitted"
    assert probes.try_pidfd() == "fails: Operation not permitted"


def test_mount_of_the_root_is_the_root() -> None:
    mount = probes.mount_of("/")
    assert mount is not None
    assert mount.point == "/"


def test_unlimited_limit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, resource.RLIM_INFINITY))
    assert probes.soft_and_hard_limit(resource.RLIMIT_NOFILE) == (512, None)


def test_all_checks_run_and_each_has_its_own_name(tmp_path: Path) -> None:
    findings = run_checks(str(tmp_path), StagerConfig(), environ={})
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) >= 18
    assert all(finding.value and finding.meaning for finding in findings)
    assert all(finding.advice for finding in findings if finding.status is not Status.OK)


def test_checks_follow_the_configuration_and_the_local_world_size(tmp_path: Path) -> None:
    config = StagerConfig.model_validate({"workers": {"count": 7}, "arena": {"buffers": 5}})
    by_name = {f.name: f for f in run_checks(str(tmp_path), config, environ={"LOCAL_WORLD_SIZE": "3"})}
    assert "7 worker processes" in by_name["cores"].meaning
    assert "3 trainers" in by_name["cores"].meaning
    assert "5 buffers" in by_name["memory"].meaning
