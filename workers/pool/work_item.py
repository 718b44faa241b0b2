"""A task on the pool's side: what it carries, how often it was tried, how it ends."""

from __future__ import annotations

import errno
import itertools
import os
import time
from concurrent.futures import Future
from typing import Any

from stager.workers.errors import RemoteTraceback, WorkerError
from stager.workers.pool import codec
from stager.workers.pool.channel import Frame
from stager.workers.pool.messages import Done, Failed

_ids = itertools.count(1)


class WorkItem:
    """One submitted call, from pickling to the resolved Future.

    It owns the descriptors in ``fds`` until :meth:`release`, so that the task can be sent again to another worker.

    Attributes:
        task_id: unique in this process.
        handed_over: sent to a worker at once, whether or not it is idle.
        attempts: how many workers died while running it.
        timeouts: how many of them were killed because it missed its deadline.
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
        "timeouts",
    )

    def __init__(
        self,
        payload: bytes,
        fds: list[int],
        label: str,
        timeout_secs: float | None,
        future: Future[Any],
        *,
        handed_over: bool,
    ) -> None:
        self.task_id = next(_ids)
        self.payload = payload
        self.fds = fds
        self.label = label
        self.timeout_secs = timeout_secs
        self.handed_over = handed_over
        self.future = future
        self.attempts = 0
        self.timeouts = 0
        self.started: float | None = None

    def claim(self) -> bool:
        """From now on it cannot be cancelled; False when it was. To be called again when it is sent again."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def start_clock(self) -> None:
        if self.started is None:
            self.started = time.monotonic()

    def extend_deadlines(self, secs: float, now: float) -> None:
        """Move the deadline by ``secs`` seconds in which the supervisor could not watch."""
        if self.started is not None:
            self.started = min(now, self.started + secs)

    def deadline(self) -> float | None:
        if self.started is None or self.timeout_secs is None:
            return None
        return self.started + self.timeout_secs

    # -- the end: runs the callbacks of the Future, so never with a lock held -----------------------------------

    def finish(self, frame: Frame) -> None:
        """Resolve the Future with a worker's reply."""
        if isinstance(frame.message, Failed):
            codec.close_fds(frame.fds)
            self.fail(_remote_error(frame.message, self.label))
        elif isinstance(frame.message, Done):
            self._succeed(frame.message.payload, frame.fds, frame.whole)

    def _succeed(self, payload: bytes, fds: list[int], whole: bool) -> None:
        if not whole:
            self.fail(
                OSError(
                    errno.EMFILE,
                    f"{os.strerror(errno.EMFILE)}: the result of {self.label} came with more descriptors than this "
                    "process may open; return fewer storages, or raise `ulimit -n`",
                )
            )
            return
        try:
            result = codec.loads(payload, fds)
        except BaseException as error:  # noqa: BLE001  (a user's __setstate__ can fail in any way)
            unreadable = WorkerError(f"the result of {self.label} cannot be unpickled: {type(error).__name__}: {error}")
            unreadable.__cause__ = error
            self.fail(unreadable)
            return
        self.release()
        self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.release()
        if self.claim():
            self.future.set_exception(error)

    def release(self) -> None:
        codec.close_fds(self.fds)


def _remote_error(message: Failed, label: str) -> BaseException:
    """What the task raised, with the worker's traceback as cause."""
    try:
        error = codec.loads(message.payload, [])
        error.__cause__ = RemoteTraceback(message.traceback)
    except BaseException as problem:  # noqa: BLE001  (so can an exception's)
        error = WorkerError(f"{label} raised an exception that cannot be unpickled here: {problem!r}")
        error.__cause__ = RemoteTraceback(message.traceback)
    return error if isinstance(error, BaseException) else WorkerError(f"{label} raised {error!r}")
