"""Pausing Python's garbage collector, for the trainer and for workers."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()  # a signal's handler may save, or load
_pauses = 0  # threads that are in one now
_was_enabled = False  # when the first of them came


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the collector, until the last of the threads that pause it has left.

    While many small objects are made and no reference cycle, searching for one doubles the time. If the program itself
    disables the collector during a pause, the end of the pause enables it.
    """
    global _pauses, _was_enabled  # noqa: PLW0603  # the collector is one for the process, too
    is_counted = False
    try:
        with _lock:
            if _pauses == 0:
                _was_enabled = gc.isenabled()
            is_counted = True  # before it is: an interrupt in between must not leave the collector off
            _pauses += 1
            gc.disable()
        yield
    finally:
        if is_counted:
            _leave()


def _leave() -> None:
    global _pauses  # noqa: PLW0603  # as above
    with _lock:
        _pauses = max(0, _pauses - 1)  # 0 already in a child that was forked in the pause
        if _pauses == 0 and _was_enabled:
            gc.enable()


def _end_in_child() -> None:
    """After fork(), in the child: the other threads that have paused it are not there."""
    global _lock, _pauses  # noqa: PLW0603  # as above
    _lock = threading.RLock()
    if _pauses and _was_enabled:
        gc.enable()
    _pauses = 0


os.register_at_fork(after_in_child=_end_in_child)
