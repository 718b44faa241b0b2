"""What this process may use of its host: the ``auto`` values and ``stager doctor`` start from here."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP_MOUNT = Path("/sys/fs/cgroup")
BACKGROUND_NICE = 10  # added to the trainer's niceness, for threads that work while it goes on
_V2 = ""  # the name of the v2 hierarchy in /proc/<pid>/cgroup, where v1 has the name of a controller
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 says "no limit" with a number near 2**63


def usable_cores(cgroup: Cgroup | None = None) -> int:
    """Count the cores this process may run on: its affinity, or its cgroup's CPU quota rounded up where that is less."""
    affinity = len(os.sched_getaffinity(0))
    quota = (cgroup or Cgroup.of_this_process()).cpu_quota_cores()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def reading_threads() -> int:
    """Return how many threads read a checkpoint unless the user says otherwise: one per usable core, at most 8."""
    return min(8, usable_cores())


def lower_priority() -> None:
    """Let the calling thread yield to the one that started it: lower its priority by ``BACKGROUND_NICE``.

    Relative, because the trainer may be niced itself: an absolute value could raise the priority. Niceness is per thread on
    Linux, and a thread begins with that of the thread that starts it.
    """
    with suppress(OSError):  # a container may forbid it
        os.nice(BACKGROUND_NICE)


def available_memory_bytes() -> int:
    """Memory that can be taken now without swapping: of the host, or of the cgroup where that is less."""
    headroom = Cgroup.of_this_process().memory_headroom_bytes()
    available = int(psutil.virtual_memory().available)
    return available if headroom is None else min(available, headroom)


class ThreadCount(NamedTuple):
    """The threads of a control group; both None without a limit."""

    limit: int | None
    used: int | None

    @property
    def left(self) -> float:
        """How many more may be started."""
        return math.inf if self.limit is None or self.used is None else self.limit - self.used


class Cgroup:
    """The control group of a process (``/proc/<pid>/cgroup``), v2 or v1, and the limits on it and on groups above it."""

    def __init__(self, membership: str, mount: Path = _CGROUP_MOUNT) -> None:
        self._mount = mount
        self._paths: dict[str, str] = {}  # by controller; ``_V2``: of all controllers
        for line in membership.splitlines():
            _, controllers, path = line.split(":", 2)
            self._paths.update(dict.fromkeys(controllers.split(","), path))

    @staticmethod
    def of_this_process() -> Cgroup:
        try:
            return Cgroup(Path("/proc/self/cgroup").read_text())
        except OSError:
            return Cgroup("")

    def cpu_quota_cores(self) -> float | None:
        """Return the CPU quota in cores; None without one."""
        quotas = [q for d in self._directories(_V2) if (q := _parse_cpu_max(_read_text(d / "cpu.max"))) is not None]
        for directory in self._directories("cpu"):
            quota, period = _read_int(directory / "cpu.cfs_quota_us"), _read_int(directory / "cpu.cfs_period_us")
            if quota is not None and period and quota > 0:
                quotas.append(quota / period)
        return min(quotas, default=None)

    def memory_limit_bytes(self) -> int | None:
        """Return the memory limit in bytes; None without one."""
        files = [directory / "memory.max" for directory in self._directories(_V2)]
        files += [directory / "memory.limit_in_bytes" for directory in self._directories("memory")]
        limits = [limit for file in files if (limit := _read_int(file)) is not None and limit < _NO_LIMIT_BYTES]
        return min(limits, default=None)

    def memory_headroom_bytes(self) -> int | None:
        """Return how many bytes may still be taken; None without a limit. Page cache does not count as used."""
        directories = (*self._directories(_V2), *self._directories("memory"))
        return min((room for d in directories if (room := _headroom(d)) is not None), default=None)

    def threads(self) -> ThreadCount:
        """Return the limit of threads, and how many there are, of the group that has the least left.

        Every group above this one has a limit of its own, which holds for all groups in it.
        """
        counts: list[ThreadCount] = []
        for directory in (*self._directories(_V2), *self._directories("pids")):  # cgroup v2, or v1
            limit, used = _read_int(directory / "pids.max"), _read_int(directory / "pids.current")
            if limit is not None and used is not None:
                counts.append(ThreadCount(limit, used))
        return min(counts, key=lambda count: count.left, default=ThreadCount(None, None))

    def _directories(self, controller: str) -> list[Path]:
        """List the group's directory and those above it, up to the mount; nothing if the host lacks the hierarchy.

        Inside a container the path in ``/proc/self/cgroup`` may be the host's and not exist here, or lead above the mount
        (``/../..``); the mount's root is then the container's own group. It is the last of this list.
        """
        path = self._paths.get(controller)
        if path is None:
            return []
        root = self._mount / controller if controller else self._mount
        group = root / path.lstrip("/")
        if ".." in group.parts:
            return [root]
        above = [group, *group.parents]
        return above[: above.index(root) + 1]


def _headroom(directory: Path) -> int | None:
    limit, used = _read_int(directory / "memory.max"), _read_int(directory / "memory.current")
    if limit is None:
        limit = _read_int(directory / "memory.limit_in_bytes")
        used = _read_int(directory / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _NO_LIMIT_BYTES:
        return None
    return max(0, limit - used + _reclaimable_bytes(directory / "memory.stat"))


def _reclaimable_bytes(stat: Path) -> int:
    """Page cache that the kernel drops when memory is needed."""
    fields = dict(line.split(" ", 1) for line in _read_text(stat).splitlines() if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _parse_cpu_max(text: str) -> float | None:
    """``200000 100000`` is 2 cores; ``max 100000`` is no quota."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read_text(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    try:
        return int(_read_text(path))
    except ValueError:  # "max", or no such file
        return None
