"""When a dead worker is replaced: at once, after a pause, or only when a task waits. No I/O here.

Workers that die together (a memory shortage, a killed process group) are one incident: a death counts only if its worker
was started after the last death that counted.
"""

from __future__ import annotations

_FIRST_DELAY_SECS = 0.1
_MAX_DELAY_SECS = 10.0


class RestartBudget:
    """Counts incidents, and says when the next worker may be started.

    Args:
        max_failed_starts: how many incidents in a row may be failures to start before :attr:`broken`.
    """

    def __init__(self, max_failed_starts: int) -> None:
        self._max_failed_starts = max_failed_starts
        self._incidents = 0  # since a task was last finished
        self._failed_starts = 0  # since a worker last became ready
        self._last_death = float("-inf")
        self._last_failed_start = float("-inf")
        self.next_start = float("-inf")  # ``time.monotonic()``; no worker is started before

    @property
    def broken(self) -> bool:
        """Whether too many starts in a row have failed: the next is tried only when a task waits."""
        return self._failed_starts > self._max_failed_starts

    def worker_ready(self) -> None:
        self._failed_starts = 0

    def task_done(self) -> None:
        self._incidents = 0

    def worker_died(self, started: float, now: float) -> None:
        """Count the death of a worker that was started at ``started``. The first one is replaced at once."""
        if started <= self._last_death:
            return
        self._last_death = now
        self._incidents += 1
        if self._incidents > 1:
            delay = _FIRST_DELAY_SECS * 2.0 ** min(self._incidents - 2, 16)
            self.next_start = now + min(_MAX_DELAY_SECS, delay)

    def start_failed(self, started: float, now: float) -> None:
        """Count a worker that never became ready, or that the operating system refused to start."""
        self.worker_died(started, now)
        if started > self._last_failed_start:
            self._last_failed_start = now
            self._failed_starts += 1
