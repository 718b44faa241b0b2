"""A task on the pool's side: what it carries, who has it, how often it was tried."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future
from typing import Any

from workers import codec
from workers.errors import RemoteTraceback

_ids = itertools.count(1)


class WorkItem:
    """One submitted call, from pickling to the resolved Future.

    It owns the descriptors in ``fds`` until :meth:`release`, so that the task can be sent again to another worker.

    Attributes:
        task_id: unique in this process.
        handed_over: sent to a worker at once, whether or not it is idle.
        attempts: how many workers died while running it.
        started: ``time.monotonic()`` when it became the first task of a ready worker; ``None`` before.
    """

    __slots__ = (
        "attempts",
        "fds",
        "future",
        "handed_over",
        "label",
        "payload",
        "started",
        "task_id",
        "timeout_secs",
    )

    def __init__(self, payload: bytes, fds: list[int], label: str, timeout_secs: float | None) -> None:
        self.task_id = next(_ids)
        self.payload = payload
        self.fds = fds
        self.label = label
        self.timeout_secs = timeout_secs
        self.future: Future[Any] = Future()
        self.handed_over = False
        self.attempts = 0
        self.started: float | None = None

    def start_clock(self) -> None:
        if self.started is None:
            self.started = time.monotonic()

    def deadline(self) -> float | None:
        if self.started is None or self.timeout_secs is None:
            return None
        return self.started + self.timeout_secs

    def succeed(self, payload: bytes, fds: list[int]) -> None:
        """Unpickle the result and resolve the Future."""
        try:
            result = codec.loads(payload, fds)
        except Exception as error:  # noqa: BLE001  (a user's __setstate__ can fail in any way)
            error.add_note(f"while unpickling the result of {self.label}") if hasattr(error, "add_note") else None
            self.fail(error)
        else:
            self.release()
            self.future.set_result(result)

    def fail_remotely(self, payload: bytes, traceback: str) -> None:
        """The task raised: its exception, with the worker's traceback as cause."""
        error = codec.loads(payload, [])
        error.__cause__ = RemoteTraceback(traceback)
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.release()
        self.future.set_exception(error)

    def release(self) -> None:
        codec.close_fds(self.fds)
