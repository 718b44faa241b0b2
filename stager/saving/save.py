"""The record of one save: its state, its Futures, its figures. No I/O here.

PLANNED --> STAGING --> STAGED --> PERSISTING --> COMMITTED
   |           |           |           |
   +-----------+-----------+-----------+--> FAILED          (PLANNED --> SKIPPED: arena.when_full is "skip")

Three views of it: ``Save`` for the threads that take part, ``SaveHandle`` for the user, and ``UnreadErrors`` for the next
``save()`` or ``close()``, which raises what nobody has read.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
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
        if (error := self.exception(timeout)) is not None:
            raise error
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception as :meth:`concurrent.futures.Future.exception` does, and count it as read."""
        error = super().exception(timeout)
        self.was_read = True
        return error

    def take_unread(self) -> BaseException | None:
        """Return the exception if there is one and nobody has read it. It counts as read then."""
        if self.was_read or not self.done() or self.cancelled():
            return None
        return self.exception()


class Save:
    """The record of one save, which the threads that take part in it move forward.

    Attributes:
        step, save_id: which save; the id is the same on all ranks.
        timeline: its events and notes.
        staging_completion, upload_completion: see :class:`~stager.SaveHandle`.
    """

    def __init__(self, step: int, save_id: str) -> None:
        self.step = step
        self.save_id = save_id
        self.timeline = Timeline(step, save_id)
        self.staging_completion: ReadTrackingFuture[None] = ReadTrackingFuture()
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = ReadTrackingFuture()
        self._report = SaveReport(step, SaveState.PLANNED)
        self._lock = threading.Lock()

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

    def record(self, **figures: Any) -> None:
        """Fill in figures of the report, by their names."""
        with self._lock:
            self._report = replace(self._report, **figures)

    def elapsed_secs(self) -> float:
        """Return how long ago ``save()`` was called."""
        return time.time() - self.timeline.started

    def complete_staging(self) -> None:
        """Resolve ``staging_completion``: the snapshot is whole, and the workers have it."""
        self.record(staged_secs=self.elapsed_secs())
        self.staging_completion.set_result(None)

    def skip(self) -> None:
        """End the save before it began: every slab was in use, and the user asked to skip then."""
        self.move(SaveState.SKIPPED)
        self.staging_completion.set_result(None)
        self.upload_completion.cancel()
        self.upload_completion.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """End the save with an error."""
        self.move(
            SaveState.FAILED
        )  # first: two threads may try to end a save, and only one of them gets past this line
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
        event = self.timeline.event
        for result in results:
            event("write", result.started, result.written, f"worker {result.pid}")
            event("sync", result.written, result.synced, f"worker {result.pid}")
        event("commit", committed.started, committed.ended, f"worker {committed.pid}")
        for note in dict.fromkeys(result.note for result in results if result.note):
            self.timeline.note(note)
        since = self.timeline.started
        self.record(
            written_secs=max((r.written for r in results), default=committed.ended) - since,
            synced_secs=max((r.synced for r in results), default=committed.ended) - since,
            committed_secs=committed.ended - since,
            linked_bytes=committed.info.linked_bytes,
            written_bytes=committed.info.nbytes - committed.info.linked_bytes,
        )
        # The figures are whole before the Future is done: whoever waited for it may read the report.
        self.move(SaveState.COMMITTED)
        self.upload_completion.set_result(committed.info)


class SaveHandle:
    """One save, as :meth:`stager.Checkpointer.save` returns it.

    Attributes:
        step: the training step.
        save_id: a nonce, the same on all ranks that save together; it names the partial directory.
        staging_completion: resolves when the snapshot is whole and the workers have it. From then on the state may be
            mutated, and the checkpoint will be committed even if this process is killed.
        upload_completion: resolves to the :class:`~stager.CheckpointInfo` when the checkpoint is durable and committed.
            Its exception says why the save failed. It is cancelled when the save was skipped.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self.step: int = save.step
        self.save_id: str = save.save_id
        self.staging_completion: ReadTrackingFuture[None] = save.staging_completion
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = save.upload_completion

    @property
    def state(self) -> SaveState:
        """How far the save is."""
        return self._save.state

    @property
    def report(self) -> SaveReport:
        """The figures so far. They are final once ``upload_completion`` is done."""
        return self._save.report

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self.state}>"


class UnreadErrors:
    """The errors of saves that somebody may still have to be told. The caller's lock protects it."""

    def __init__(self) -> None:
        self._uploads: list[ReadTrackingFuture[CheckpointInfo]] = []

    def add(self, save: Save) -> None:
        """Watch a save."""
        self._uploads.append(save.upload_completion)

    def raise_oldest(self) -> None:
        """Raise the oldest error that nobody has read, if there is one. It counts as read then."""
        for upload in [upload for upload in self._uploads if upload.done()]:
            self._uploads.remove(upload)
            if (error := upload.take_unread()) is not None:
                raise error

    def raise_all(self) -> None:
        """Raise the oldest unread error, with the others as its context: there is no later call that could raise them."""
        unread = [error for upload in self._uploads if (error := upload.take_unread()) is not None]
        errors = list({id(error): error for error in unread}.values())  # saves that fail together share one error
        for error, following in pairwise(errors):
            last = error
            while (inner := last.__cause__ or last.__context__) is not None:
                last = inner
            if last is not following:
                last.__context__ = following
        if errors:
            raise errors[0]
