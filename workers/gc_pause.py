"""Pausing Python's garbage collector, for the trainer and for workers."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0  # threads that are in one now
_was_enabled = False  # when the first of them came


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the collector, until the last of the threads that pause it has left.

    While many small objects are made and no reference cycle, searching for one doubles the time.
    """
    global _pauses, _was_enabled  # noqa: PLW0603  # the collector is one for the process, too
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses = max(0, _pauses - 1)  # 0 already in a child that was forked in the pause
            if _pauses == 0 and _was_enabled:
                gc.enable()


def _end_in_child() -> None:
    """After fork(), in the child: the other threads that have paused it are not there."""
    global _lock, _pauses  # noqa: PLW0603
    _lock = threading.Lock()
    if _pauses and _was_enabled:
        gc.enable()
    _pauses = 0


os.register_at_fork(after_in_child=_end_in_child)
