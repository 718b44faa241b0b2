"""Which checkpoints are being deleted: other saves go on meanwhile, and a save to the same path waits."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from stager.workers.long_wait import LongWait


class Deletions:
    """The paths of checkpoints that threads are deleting now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._paths: Counter[str] = Counter()

    @contextmanager
    def of(self, path: str) -> Iterator[None]:
        """While it is entered, the checkpoint at ``path`` is being deleted."""
        with self._changed:
            self._paths[path] += 1
        try:
            yield
        finally:
            with self._changed:
                self._paths[path] -= 1
                self._paths += Counter()  # without those that are 0
                self._changed.notify_all()

    def wait(self, path: str | None = None) -> None:
        """Wait until none is being deleted: the one at ``path``, or any."""

        def is_over(timeout: float | None) -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: not (self._paths if path is None else self._paths[path]), timeout)

        what = "checkpoints" if path is None else path
        LongWait(f"{what} to be deleted").until(is_over)
