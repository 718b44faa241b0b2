"""A task on the pool's side: what it carries, how often it was tried, how it ends."""

from __future__ import annotations

import errno
import itertools
import math
import os
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from stager.workers.errors import RemoteTraceback, WorkerError
from stager.workers.pool import codec
from stager.workers.pool.channel import Frame
from stager.workers.pool.messages import Done, Failed

_ids = itertools.count(1)


@dataclass(slots=True, eq=False)
class WorkItem:
    """One submitted call, from pickling to the resolved Future.

    Attributes:
        fds: descriptors that the call refers to. The item owns them until :meth:`release`, so that it can be sent again.
        handed_over: sent to a worker at once, whether or not it is idle.
        task_id: unique in this process.
        attempts: how many workers died while running it.
        timeouts: how many of them were killed because it missed its deadline.
        started: ``time.monotonic()`` when it became the first task of a ready worker; infinite before.
    """

    payload: bytes
    fds: list[int]
    label: str
    timeout_secs: float | None
    future: Future[Any]
    handed_over: bool
    task_id: int = field(default_factory=lambda: next(_ids))
    attempts: int = 0
    timeouts: int = 0
    started: float = math.inf

    def claim(self) -> bool:
        """From now on it cannot be cancelled; False when it was. To be called again when it is sent again."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def start_clock(self) -> None:
        self.started = min(self.started, time.monotonic())

    def extend_deadlines(self, secs: float, now: float) -> None:
        """Move the deadline by ``secs`` seconds in which the supervisor could not watch."""
        if self.started < math.inf:
            self.started = min(now, self.started + secs)

    def deadline(self) -> float:
        return math.inf if self.timeout_secs is None else self.started + self.timeout_secs

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
            message = (
                f"{os.strerror(errno.EMFILE)}: the result of {self.label} came with more descriptors than this "
                "process may open; return fewer storages, or raise `ulimit -n`"
            )
            self.fail(OSError(errno.EMFILE, message))
            return
        try:
            result = codec.loads(payload, fds)
        except BaseException as error:  # noqa: BLE001  (a user's __setstate__ can fail in any way)
            unreadable = WorkerError(f"the result of {self.label} cannot be unpickled: {type(error).__name__}: {error}")
            unreadable.__cause__ = error
            self.fail(unreadable)
        else:
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
    error: BaseException
    try:
        loaded: object = codec.loads(message.payload, [])
        error = loaded if isinstance(loaded, BaseException) else WorkerError(f"{label} raised {loaded!r}")
    except BaseException as problem:  # noqa: BLE001  (a user's exception class can fail in any way)
        error = WorkerError(f"{label} raised an exception that cannot be unpickled here: {problem!r}")
    error.__cause__ = RemoteTraceback(message.traceback)
    return error
