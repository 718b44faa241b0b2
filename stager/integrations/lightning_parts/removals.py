"""Removing checkpoints that Lightning no longer wants, without a moment in which there is none.

NOTE [ A removal waits for the replacement ]
``ModelCheckpoint`` saves a checkpoint, and then asks to remove the one that it replaces. With a CheckpointIO that blocks,
the new one is on the disk by then. Here it is still being written. If the old one went at once, a job that is killed a
moment later would have no checkpoint; and if the disk is slower than the interval, each save would be cancelled by the
next. So:
  1. A removal remembers the save that was begun last before it. It is done when that save is committed.
  2. If that save fails, the removal waits for the next save, and so on. What never got a replacement stays.
  3. A path that is saved again needs no removal: the new checkpoint replaces the old one.
  4. A save to the removed path that is still in flight by then is cancelled, and does not appear later.
  5. If nothing else is in flight, the removal is done at once.
A thread waits for the saves, and ends when nothing is left to remove. The training thread never waits for it, except to save
to a path that is being removed just now, and in ``drain()``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass

from stager import SaveHandle, SaveState

logger = logging.getLogger("stager")


@dataclass(eq=False)
class _Removal:
    """A path to remove when ``replacement`` is committed. None: its replacement failed, and the next save is not begun."""

    path: str
    replacement: SaveHandle | None


class Removals:
    """Removes paths, each when the save that replaces it is committed.

    Args:
        remove: removes one path now; called in a thread of its own.
    """

    def __init__(self, remove: Callable[[str], None]) -> None:
        self._remove = remove
        self._changed = threading.Condition(threading.RLock())  # a signal handler may save while this thread has it
        self._waiting: list[_Removal] = []
        self._running: str | None = None  # the path that is being removed
        self._thread: threading.Thread | None = None

    def add(self, path: str, replacement: SaveHandle) -> None:
        """Remove ``path`` when ``replacement`` is committed."""
        with self._changed:
            self._waiting.append(_Removal(path, replacement))
            self._start()

    def forget(self, path: str) -> None:
        """Do not remove ``path``: it is about to be saved again. Waits for a removal of it that has begun."""
        with self._changed:
            self._waiting = [removal for removal in self._waiting if removal.path != path]
            while self._running == path:
                self._changed.wait()

    def replace(self, handle: SaveHandle) -> None:
        """Tell of a new save: removals whose replacement failed wait for it."""
        with self._changed:
            for removal in self._waiting:
                if removal.replacement is None:
                    removal.replacement = handle
            self._start()

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every removal is done that will be done. What is kept is logged.

        Args:
            timeout: seconds to wait for the saves that replace something; what they would have replaced is kept then.
        """
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        with self._changed:
            kept, self._waiting = [removal.path for removal in self._waiting], []
        for path in kept:
            logger.warning("%s was to be removed, and stays: the checkpoint that replaces it is not committed", path)

    def _start(self) -> None:
        if self._thread is None and any(removal.replacement is not None for removal in self._waiting):
            self._thread = threading.Thread(target=self._run, name="stager-removals")
            self._thread.start()

    def _run(self) -> None:
        while (removal := self._next()) is not None:
            assert removal.replacement is not None
            wait([removal.replacement.upload_completion])  # does not count as read
            if not self._take(removal):
                continue
            try:
                self._remove(removal.path)
            except Exception:  # training goes on: a checkpoint too many does no harm
                logger.exception("%s could not be removed; remove it yourself", removal.path)
            finally:
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _next(self) -> _Removal | None:
        with self._changed:
            found = next((removal for removal in self._waiting if removal.replacement is not None), None)
            if found is None:
                self._thread = None
            return found

    def _take(self, removal: _Removal) -> bool:
        """Begin a removal whose replacement has ended; False: it was forgotten, or has to wait for another one."""
        with self._changed:
            if removal not in self._waiting:
                return False
            assert removal.replacement is not None
            if removal.replacement.state is not SaveState.COMMITTED:
                removal.replacement = None
                return False
            self._waiting.remove(removal)
            self._running = removal.path
            return True
