"""How the bytes of a part are written, whatever the storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WRITE_BYTES = 4 << 20  # a piece of this size stays in the CPU's cache between hashing and writing


@dataclass(frozen=True, slots=True)
class Writing:
    """The settings of how bytes are written.

    Attributes:
        drop_page_cache: after the sync, take the written pages out of the page cache.
        max_bytes_per_sec: the limit of one worker; None: no limit.
        direct_io: write past the page cache (``direct_io.py``); None: only on file systems that gain by it.
    """

    drop_page_cache: bool = False
    max_bytes_per_sec: float | None = None
    direct_io: bool | None = None


PLAIN = Writing()


class Pace:
    """A limit of bytes per second, which any stretch of time exceeds by at most one write; or None: no limit."""

    def __init__(
        self,
        bytes_per_sec: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_sec = bytes_per_sec
        self._clock = clock
        self._sleep = sleep
        self._free_at = float("-inf")

    def wrote(self, nbytes: int) -> None:
        """Sleep until the next bytes may be written."""
        if self._bytes_per_sec is not None:
            now = self._clock()
            self._free_at = max(now, self._free_at) + nbytes / self._bytes_per_sec
            self._sleep(self._free_at - now)
