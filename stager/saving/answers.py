"""The workers' answers to one save, as one event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from stager.workers.checkpoint.commit.persist import PartResult
from stager.workers.errors import LeftRunningError


class PartResults:
    """Collects the parts' Futures; calls ``then`` once, when all are done, with the results and the first error; never, when
    the workers were left to finish by themselves (``ending.py``): their partial directory must then stay."""

    def __init__(
        self, futures: list[Future[PartResult]], then: Callable[[list[PartResult], BaseException | None], None]
    ) -> None:
        self._missing = len(futures)
        self._lock = threading.Lock()
        self._futures = futures
        self._then = then
        for future in futures:
            future.add_done_callback(self._one_done)

    def _one_done(self, _: Future[PartResult]) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        errors = [error for future in self._futures if (error := future.exception()) is not None]
        if any(isinstance(error, LeftRunningError) for error in errors):
            return
        results = [future.result() for future in self._futures if future.exception() is None]
        self._then(results, errors[0] if errors else None)
