"""Signs of life of a worker that holds a task, and the judgement that there are none.

NOTE [ When a worker is stuck ]
A deadline for a task must be generous: the task may write many gigabytes to a slow disk. A worker that can do nothing at all
any more is noticed sooner. A small thread of the worker (the one that watches the trainer, ``worker_main.py``) adds to an
eventfd every few seconds. That wakes nobody: the supervisor reads it when it looks after busy workers. Only if nothing was
added since its last look does it read /proc. A worker is *silent* when, since the last look,
  * nothing was added: no Python code ran in its small thread, and
  * no processor time was used: it is not computing with the GIL held (a large ``json.loads``), and
  * no thread is running or ready (the machine is overloaded), in uninterruptible sleep (a slow disk), or traced (a
    debugger).
Then the worker is stopped (SIGSTOP, a frozen cgroup), or the thread that has the GIL waits for ever. A long fsync, or a task
that waits without the GIL, is not silent: the small thread goes on.

Only time during which the supervisor looked counts. When everything was stopped (the laptop slept, the whole job got
SIGSTOP), no deadline comes nearer: see :class:`HeartbeatClock`.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress

_MAX_INTERVAL_SECS = 5.0
_LOOKS_PER_TIMEOUT = 8
# A thread in one of these states will go on by itself: Running, uninterruptible (D), traced (t), parked or waking.
_WILL_GO_ON = frozenset("RDtPW")


def look_interval(timeout_secs: float | None) -> float:
    """Seconds between two beats of a worker, and between two looks of the supervisor."""
    if timeout_secs is None:
        return _MAX_INTERVAL_SECS
    return min(_MAX_INTERVAL_SECS, timeout_secs / _LOOKS_PER_TIMEOUT)


class HeartbeatClock:
    """The supervisor's time: what it saw go by, and when to look again. No I/O.

    Time that passes while the supervisor could not look (its process was stopped, a callback took long) is *lost*: it is
    not held against the workers, who may have been stopped as well, or whose answer may be unread.
    """

    def __init__(self, timeout_secs: float | None, now: float) -> None:
        self.interval = look_interval(timeout_secs)
        # A worker may stop right after a beat, and we notice at the look after the next: two intervals of the timeout.
        self.limit_secs = math.inf if timeout_secs is None else timeout_secs - 2 * self.interval
        self._seen_until = now
        self._wait_began = now
        self._last_look = now

    def begin_wait(self, now: float) -> None:
        self._wait_began = now

    def end_wait(self, now: float, wait_secs: float) -> float:
        """The wait should have taken ``wait_secs`` at most; returns the seconds lost since the last one ended."""
        seen = min(now - self._wait_began, wait_secs)
        lost = now - self._seen_until - seen
        self._seen_until = now
        return lost

    def look(self, now: float) -> float:
        """Return the seconds to count for each worker: 0 if it is not yet time to look, else one interval.

        However long the supervisor could not look, it counts as one interval: see *lost* above.
        """
        if now - self._last_look < self.interval:
            return 0.0
        self._last_look = now
        return self.interval

    @property
    def next_look(self) -> float:
        return self._last_look + self.interval


class Pulse:
    """The signs of life of one worker, as the supervisor sees them: on ``fd``, a borrowed eventfd, and in /proc."""

    def __init__(self, pid: int, fd: int) -> None:
        self._pid = pid
        self._fd = fd
        self._cpu_ticks = -1  # not looked yet
        self.silent_secs = 0.0  # for how long no sign was seen

    def look(self, elapsed: float) -> None:
        """Look for a sign, once per interval while the worker holds a task. ``elapsed``: seconds since the last look."""
        if self._has_beaten() or self._is_at_work():
            self.silent_secs = 0.0
        else:
            self.silent_secs += elapsed

    def _has_beaten(self) -> bool:
        try:
            return os.eventfd_read(self._fd) > 0
        except BlockingIOError:
            return False

    def _is_at_work(self) -> bool:
        """Whether it used the processor since the last look, or will do so without anybody's help."""
        before, self._cpu_ticks = self._cpu_ticks, self._cpu_time()
        return self._cpu_ticks != before or bool(_WILL_GO_ON & self._thread_states())

    def _cpu_time(self) -> int:
        """Return the clock ticks of all threads, user and system; -1 if the process is gone."""
        fields = _stat_fields(f"/proc/{self._pid}/stat")
        return int(fields[11]) + int(fields[12]) if fields else -1

    def _thread_states(self) -> frozenset[str]:
        states = set()
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{self._pid}/task"):
                states.update(_stat_fields(f"/proc/{self._pid}/task/{thread}/stat")[:1])
        return frozenset(states)


def _stat_fields(path: str) -> list[str]:
    """Return the fields of a ``stat`` file from the third, the state, on; [] if the process is gone."""
    try:
        with open(path) as file:
            return file.read().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return []
