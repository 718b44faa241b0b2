"""What a run holds, as the operating system sees it: its processes, its slabs, its names in ``/dev/shm``."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from tests import fork_server, prepared_workers


def child_pids() -> list[int]:
    """This process's children: the workers of its pools, also those that have just been forked."""
    kept = fork_server.server_pids() | prepared_workers.server_pids()
    return sorted({child.pid for child in psutil.Process().children()} - kept)


def workers_of(pid: int) -> list[int]:
    """The live workers that this process has started."""
    children = psutil.Process(pid).children()
    return [child.pid for child in children if any("worker_main" in word for word in child.cmdline())]


def shm_names(*pids: int) -> list[str]:
    """The names in ``/dev/shm`` that these processes have made, also those that ended: torch puts the pid into them.

    All that is there would be too much: other tests run at the same time.
    """
    parts = {str(pid) for pid in pids}
    return [name for name in os.listdir("/dev/shm") if parts & set(name.split("_"))]


def slab_ranges() -> list[tuple[int, int]]:
    """The addresses [begin, end) at which this process has mapped slabs."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "stager-slab" in line]
    return [(int(begin, 16), int(end, 16)) for begin, end in (line.split()[0].split("-") for line in lines)]


def slab_nbytes() -> int:
    """Bytes of slabs that this process has mapped, in whole pages."""
    return sum(end - begin for begin, end in slab_ranges())
