"""Waiting for what nothing announces: a thread that blocks. A slow machine fails nothing here; only a hang does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from stager.workers.gc_pause import no_collection

_HANG_SECS = 60.0
_BLOCKING = (threading.Condition.wait.__code__, threading.Thread.join.__code__)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread or process is about to do, and that nothing announces."""
    deadline = time.monotonic() + _HANG_SECS
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        threading.Event().wait(0.001)


def wait_until_blocked(thread: threading.Thread, function: Callable[..., Any]) -> None:
    """Until ``thread``, somewhere below ``function``, waits for another one.

    Raises:
        AssertionError: the thread has ended, so it has waited for nobody.
    """
    code: CodeType = function.__code__

    def is_blocked() -> bool:
        assert thread.is_alive(), f"it did not wait in {function.__qualname__}()"
        frames = list(_frames(thread))
        return any(frame.f_code in _BLOCKING for frame in frames[:2]) and any(frame.f_code is code for frame in frames)

    wait_until(is_blocked)


def _frames(thread: threading.Thread) -> Iterator[FrameType]:
    """From the innermost to the outermost."""
    assert thread.ident is not None
    with no_collection():  # or it may hang: see stager/snapshot/tripwires.py
        frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        yield frame
        frame = frame.f_back
