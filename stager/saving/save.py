"""The record of one save: its state, its Futures, its figures. No I/O here.

PLANNED --> STAGING --> STAGED --> PERSISTING --> COMMITTED
   |           |           |           |
   +-----------+-----------+-----------+--> FAILED          (PLANNED --> SKIPPED: arena.when_full is "skip")

Users see a save through its :class:`~stager.SaveHandle` (``save_handle.py``).
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Generic, TypeVar

from stager.telemetry.event import Timeline
from stager.telemetry.report import SaveReport, SaveState
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.commit.persist import PartResult
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.errors import InternalError

T = TypeVar("T")

_TRANSITIONS = {
    SaveState.PLANNED: {SaveState.STAGING, SaveState.FAILED, SaveState.SKIPPED},
    SaveState.STAGING: {SaveState.STAGED, SaveState.FAILED},
    SaveState.STAGED: {SaveState.PERSISTING, SaveState.FAILED},
    SaveState.PERSISTING: {SaveState.COMMITTED, SaveState.FAILED},
    SaveState.COMMITTED: set(),
    SaveState.FAILED: set(),
    SaveState.SKIPPED: set(),
}


class ReadTrackingFuture(Future[T], Generic[T]):
    """A Future that knows whether somebody has read its exception.

    Attributes:
        was_read: ``result()`` or ``exception()`` has returned or raised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.was_read = False

    def result(self, timeout: float | None = None) -> T:
        """Return the result as :meth:`concurrent.futures.Future.result` does, and count it as read."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception as :meth:`concurrent.futures.Future.exception` does, and count it as read."""
        error = super().exception(timeout)
        self.was_read = True
        return error

    def unread_error(self) -> BaseException | None:
        """Return the exception if there is one and nobody has read it."""
        if self.was_read or not self.done() or self.cancelled():
            return None
        return super().exception()


class Save:
    """The record of one save, which the threads that take part in it move forward.

    Attributes:
        timeline: the save's step, its id, its events and notes.
        staging_completion, upload_completion: see :class:`~stager.SaveHandle`.
    """

    def __init__(self, step: int, save_id: str) -> None:
        self.timeline = Timeline(step, save_id)
        self.staging_completion: ReadTrackingFuture[None] = ReadTrackingFuture()
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = ReadTrackingFuture()
        self._report = SaveReport(step, SaveState.PLANNED)
        self._lock = threading.Lock()

    @property
    def step(self) -> int:
        """The training step."""
        return self.timeline.step

    @property
    def save_id(self) -> str:
        """The id of this save, the same on all ranks."""
        return self.timeline.save_id

    @property
    def state(self) -> SaveState:
        """How far the save is."""
        return self._report.state

    @property
    def report(self) -> SaveReport:
        """The figures so far."""
        with self._lock:
            return replace(self._report, events=self.timeline.events, notes=self.timeline.notes)

    def move(self, to: SaveState) -> None:
        """Change the state.

        Raises:
            InternalError: the diagram above has no such transition.
        """
        with self._lock:
            before = self._report.state
            if to not in _TRANSITIONS[before]:
                raise InternalError(f"save of step {self.step} cannot go from {before} to {to}")
            self._report = replace(self._report, state=to)

    def describe(self, nbytes: int, num_tensors: int, num_objects: int) -> None:
        """Record how much the snapshot holds, in bytes and items."""
        self._set(nbytes=nbytes, num_tensors=num_tensors, num_objects=num_objects)

    def unblock(self) -> None:
        """Record that ``save()`` returns now."""
        self._set(blocked_secs=self._now())

    def complete_staging(self) -> None:
        """Resolve ``staging_completion``: the snapshot is whole, and the workers have it."""
        self._set(staged_secs=self._now())
        self.staging_completion.set_result(None)

    def skip(self) -> None:
        """End the save before it began: every slab was in use, and the user asked to skip then."""
        self.move(SaveState.SKIPPED)
        self.staging_completion.set_result(None)
        self.upload_completion.cancel()
        self.upload_completion.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """End the save with an error."""
        self.move(SaveState.FAILED)
        if not self.staging_completion.done():
            self.staging_completion.set_exception(error)
            self.staging_completion.was_read = True  # upload_completion has the same error: raise it once
        self.upload_completion.set_exception(error)

    def commit(self, results: list[PartResult], committed: Committed) -> None:
        """End the save with a checkpoint.

        Args:
            results: of this rank's parts.
            committed: the checkpoint, of all ranks.
        """
        for result in results:
            process = f"worker {result.pid}"
            self.timeline.event("write", result.started, result.written, process)
            self.timeline.event("sync", result.written, result.synced, process)
        self.timeline.event("commit", committed.started, committed.ended, f"worker {committed.pid}")
        for note in dict.fromkeys(result.note for result in results if result.note):
            self.timeline.note(note)
        since = self.timeline.since_start
        self._set(
            written_secs=since(max((r.written for r in results), default=committed.ended)),
            synced_secs=since(max((r.synced for r in results), default=committed.ended)),
            committed_secs=since(committed.ended),
            linked_bytes=committed.info.linked_bytes,
            written_bytes=committed.info.nbytes - committed.info.linked_bytes,
        )
        self.move(SaveState.COMMITTED)
        self.upload_completion.set_result(committed.info)

    def _now(self) -> float:
        return self.timeline.since_start(time.time())

    def _set(self, **figures: Any) -> None:
        with self._lock:
            self._report = replace(self._report, **figures)
