"""What an episode could leave in the system: shared memory, names in /dev/shm, descriptors of long-lived processes."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import psutil

_PATIENCE_SECS = 10.0
_RECHECK_SECS = 0.1
_NEGLIGIBLE_KB = 1024


@dataclass(frozen=True, slots=True)
class Traces:
    """What the system holds at one moment.

    Attributes:
        shmem_bytes: all shared memory of the machine: Shmem in /proc/meminfo.
        names: the names in /dev/shm.
        num_fds: open descriptors of this process and of the fork server.
    """

    shmem_bytes: int
    names: frozenset[str]
    num_fds: tuple[int, ...]

    @staticmethod
    def take(server_pid: int) -> Traces:
        """Look at the system now."""
        ours = (os.getpid(), server_pid)
        return Traces(_shmem_bytes(), frozenset(os.listdir("/dev/shm")), tuple(map(_num_fds, ours)))

    def left_behind(self, server_pid: int, tolerance_bytes: int) -> list[str]:
        """Return what is new since these traces were taken and does not go away within some seconds.

        Other programs use the machine, too. Names with the pid of a living process are theirs. More shared memory counts
        only if no other process has any, because it cannot be told whose it is.
        """
        deadline = time.monotonic() + _PATIENCE_SECS
        while problems := self._compare(Traces.take(server_pid), server_pid, tolerance_bytes):
            if time.monotonic() > deadline:
                return problems
            time.sleep(_RECHECK_SECS)
        return []

    def _compare(self, now: Traces, server_pid: int, tolerance_bytes: int) -> list[str]:
        problems = []
        grown = now.shmem_bytes - self.shmem_bytes
        if grown > tolerance_bytes and not others_with_shared_memory({os.getpid(), server_pid}):
            problems.append(f"{grown:,} bytes more of shared memory than before the episode")
        problems += [
            f"/dev/shm/{name} was left behind" for name in sorted(now.names - self.names) if not _has_owner(name)
        ]
        for who, before, after in zip(("conductor", "fork server"), self.num_fds, now.num_fds, strict=True):
            if after > before:
                problems.append(f"the {who} had {before} descriptors before the episode and has {after} after it")
        return problems


def _shmem_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("Shmem:"))
    return int(line.split()[1]) * 1024


def others_with_shared_memory(ours: Collection[int]) -> list[int]:
    """Processes that hold or map shared memory and are not ``ours``."""
    return [pid for pid in psutil.pids() if pid not in ours and (_maps_shared_memory(pid) or _holds_shared_memory(pid))]


def _maps_shared_memory(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("RssShmem:")), "RssShmem: 0")
    except OSError:
        return False
    return int(line.split()[1]) > _NEGLIGIBLE_KB


def _holds_shared_memory(pid: int) -> bool:
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith(("/memfd:", "/dev/shm/")):
                return True
    return False


def _num_fds(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _has_owner(name: str) -> bool:
    """Whether a pid in the name (``torch_<pid>_...``) is that of a living process; ours have all ended."""
    numbers = [int(part) for part in name.replace("-", "_").split("_") if part.isdigit()]
    return any(os.path.exists(f"/proc/{number}") for number in numbers)
