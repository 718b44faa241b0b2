"""A signal that announces the end: a flag for the training loop, and a deadline for the last save.

NOTE [ The end under a deadline ]
SLURM sends SIGTERM (or, with ``--signal``, SIGUSR1) to every process of a job and SIGKILL some time later; other job
managers do alike. The handler here only notes the time. The loop reads ``requested``, saves once more and leaves the
``with`` block; ``close()`` then waits for the commit no longer than what is left. What is not committed by then is in the
hands of the workers: they do not die of these signals, and commit it after this process is gone, unless they are killed
with it.
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

from stager.workers.errors import UsageError

_Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption:
    """Whether the end was announced, and how much time is left. Made by :meth:`stager.Checkpointer.on_preemption`.

    A handler that was there before is called as well, after ours; one that would end the process (the default action) or
    ignore the signal is not. Further signals change nothing. Handlers of Python run in the main thread, between two
    instructions: a long call into C delays them.

    Args:
        signals: which announce the end.
        deadline_secs: seconds from the first signal within which the process is to be gone; None: as long as it takes.

    Raises:
        UsageError: not called in the main thread, the only one where Python can set a signal's handler.
        ValueError: no such signal, or a deadline below 0.
    """

    def __init__(self, signals: Iterable[int], deadline_secs: float | None) -> None:
        if deadline_secs is not None and not deadline_secs >= 0:
            raise ValueError(f"deadline_secs must be 0 or more, got {deadline_secs}")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "on_preemption() was called in another thread than the main one, the only one where Python can set a "
                "signal's handler; call it there"
            )
        self._deadline_secs = deadline_secs
        self._owner = os.getpid()
        self._requested_at: float | None = None
        self._signal: signal.Signals | None = None
        self._previous: dict[int, _Handler] = {}
        self._active = True
        try:
            for number in signals:
                self._previous[number] = signal.signal(number, self._handle)
        except BaseException:
            self.restore()
            raise
        _installed.add(self)

    @property
    def requested(self) -> bool:
        """Whether the end was announced: save, and leave."""
        return self._requested_at is not None

    @property
    def signal(self) -> signal.Signals | None:
        """The first that came; None: none yet, or :meth:`request` was called."""
        return self._signal

    def remaining_secs(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed; None: nothing was announced, or there is no deadline."""
        if self._requested_at is None or self._deadline_secs is None:
            return None
        return max(0.0, self._requested_at + self._deadline_secs - time.monotonic())

    def request(self) -> None:
        """As if a signal had come: for an announcement that is made in another way, by a cloud's metadata say."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def restore(self) -> None:
        """Put back the handlers from before. ``close()`` does this.

        A handler that somebody has set after ours stays. In another thread than the main one nothing can be put back: our
        handler stays, and does what the one before would have done.
        """
        self._active = False
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, _settable(previous))
            _installed.discard(self)

    # -- the handler: sets attributes only, for it may interrupt anything, a logger's lock included --------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if callable(previous):
            self._note(number)
            previous(number, frame)
        elif not self._applies and previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self._note(number)

    @property
    def _applies(self) -> bool:
        """Not after ``restore()``, nor in a forked child that has not come to :func:`_restore_all` yet."""
        return self._active and self._owner == os.getpid()

    def _note(self, number: int) -> None:
        if self._applies and self._requested_at is None:
            self._signal = signal.Signals(number)
            self.request()


def _settable(handler: _Handler) -> Callable[[int, FrameType | None], Any] | int:
    """None is a handler that was not set from Python: it cannot be put back."""
    return signal.SIG_DFL if handler is None else handler


def _restore_all() -> None:
    """In a forked child (a DataLoader worker, say): the signals mean there what they meant before."""
    for preemption in list(_installed):
        preemption.restore()


_installed: weakref.WeakSet[Preemption] = weakref.WeakSet()
os.register_at_fork(after_in_child=_restore_all)
