"""Preemption: a signal announces the end of this process. A flag for the training loop, a deadline for the last save.

NOTE [ The end under a deadline ]
SLURM sends SIGTERM (or, with ``--signal``, SIGUSR1) to every process of a job and SIGKILL some time later; other job
managers do the same.
  1. The handler here only records the time.
  2. The loop reads ``requested``, saves once more and leaves the ``with`` block.
  3. ``close()`` waits for commits, but not beyond the deadline.
  4. It detaches from saves that are not committed by then. The workers do not die of these signals. They commit these saves
     after this process is gone, unless they are killed with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from stager.workers.errors import ArgumentError, UsageError

_Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption:
    """Whether the end was announced, and how much time is left. Made by :meth:`stager.Checkpointer.on_preemption`.

    Without signals only :meth:`request` announces it, and any thread may make it.

    An earlier Python handler of the signal is called as well, after ours. The default action, which would end the process,
    is not taken. Only the first signal counts. Python runs signal handlers in the main thread, between two instructions, so
    a long call into C delays them.

    Raises:
        UsageError: not called in the main thread, the only one where Python can set a signal's handler.
        ArgumentError: no such signal, one that no process can handle, or a deadline below 0.
    """

    def __init__(self, signals: Iterable[int] = (), deadline_secs: float | None = None) -> None:
        if deadline_secs is not None and not deadline_secs >= 0:
            raise ArgumentError(f"deadline_secs must be 0 or more, got {deadline_secs}")
        signals = tuple(signals)
        if signals and threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "on_preemption() was not called in the main thread, the only one in which Python can set a signal handler; "
                "call it there"
            )
        self._deadline_secs = deadline_secs
        self._owner = os.getpid()
        self._requested_at: float | None = None
        self._signal: signal.Signals | None = None
        self._previous: dict[int, _Handler] = {}  # signal -> the handler before ours
        self._active = True
        try:
            for number in signals:
                self._previous[number] = self._install(number)
        except BaseException:
            self.restore()
            raise
        _installed.add(self)

    def _install(self, number: int) -> _Handler:
        try:
            return signal.signal(number, self._handle)
        except (OSError, ValueError, TypeError) as error:
            known = isinstance(number, int) and number in set(signal.Signals)
            name = signal.Signals(number).name if known else repr(number)
            problem = "no process can handle" if known else "is not the number of a signal"
            raise ArgumentError(
                f"signals has {name}, which {problem}; give signals that announce the end, as in "
                "on_preemption([signal.SIGTERM])"
            ) from error

    @property
    def requested(self) -> bool:
        """Whether the end was announced: then save once more, and leave the training loop."""
        return self._requested_at is not None

    @property
    def signal(self) -> signal.Signals | None:
        """The first signal that came; None: none has come, or :meth:`request` was called instead."""
        return self._signal

    def remaining_secs(self) -> float | None:
        """Return the seconds until the deadline, 0 after it; None: the end was not announced, or there is no deadline."""
        if self._requested_at is None or self._deadline_secs is None:
            return None
        return max(0.0, self._requested_at + self._deadline_secs - time.monotonic())

    def request(self) -> None:
        """Announce the end as a signal would: for announcements by other means, such as a cloud's metadata service."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def restore(self) -> None:
        """Restore the earlier handlers, as ``close()`` does. A handler that somebody has set after ours stays.

        Outside of the main thread nothing can be restored: our handler stays, and does what the earlier one would have done.
        """
        self._active = False
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:
                    # None: it was not set from Python and cannot be set again, so take the default action
                    signal.signal(number, signal.SIG_DFL if previous is None else previous)
            _installed.discard(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # It only sets attributes, because it may interrupt code that holds a lock (of a logger, say).
        applies = self._active and self._owner == os.getpid()  # not in a forked child before it reaches _restore_all()
        if applies and self._requested_at is None:
            self._signal = signal.Signals(number)
            self.request()
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        elif not applies and previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)  # what would have happened without us
            os.kill(os.getpid(), number)


def _restore_all() -> None:
    """Give the signals their earlier meaning in a forked child (a DataLoader worker, for example)."""
    for preemption in list(_installed):
        preemption.restore()


_installed: weakref.WeakSet[Preemption] = weakref.WeakSet()
os.register_at_fork(after_in_child=_restore_all)
