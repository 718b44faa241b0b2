"""CPU time and memory of this process."""

from __future__ import annotations

import time
from pathlib import Path

import psutil


class Stages:
    """CPU seconds of one thing after the other, and the memory that all of it took."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._base_bytes = psutil.Process().memory_info().rss
        self._last = time.process_time()

    def lap(self) -> float:
        now = time.process_time()
        secs, self._last = now - self._last, now
        return secs

    def peak_bytes(self) -> int:
        """Beyond what there was at first. (``ru_maxrss`` would be no less than what the parent had when it forked.)"""
        lines = Path("/proc/self/status").read_text().splitlines()
        peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        return max(0, peak_kib * 1024 - self._base_bytes)
