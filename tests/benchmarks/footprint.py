"""What a process tree holds: memory with shared pages counted once, and descriptors.

PSS (proportional set size) divides each shared page by the number of processes that map it, so that its sum over a tree
counts it once; a slab that the trainer and two workers map is one slab. The page cache of written files is in none of it.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks.records import Memory

_INTERVAL_SECS = 0.02


def pss_bytes(pid: int) -> int:
    """0 when the process is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def tree_pss_bytes(pid: int) -> int:
    return sum(pss_bytes(member) for member in tree(pid))


def num_fds(pid: int | None = None) -> int:
    """0 when the process is gone."""
    try:
        return len(os.listdir(f"/proc/{pid or 'self'}/fd"))
    except OSError:
        return 0


class PeakWatch:
    """Reads the tree of ``pid`` again and again, from another process, from when ``ready`` says so until stopped."""

    def __init__(self, pid: int, ready: Path) -> None:
        self._pid = pid
        self._ready = ready
        self._stop = threading.Event()
        self._peak_bytes = 0
        self._num_processes = 0
        self._num_readings = 0
        self._thread = threading.Thread(target=self._run, name="bench-memory")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_SECS):
            if not self._num_readings and '"Ready"' not in _text(self._ready):
                continue
            pids = tree(self._pid)
            self._peak_bytes = max(self._peak_bytes, sum(map(pss_bytes, pids)))
            self._num_processes = max(self._num_processes, len(pids))
            self._num_readings += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def memory(self, base_bytes: int) -> Memory:
        return Memory(base_bytes, max(self._peak_bytes, base_bytes), self._num_processes, self._num_readings)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
