"""The record of one save: its state, its Futures, its figures. No I/O here.

PLANNED --> STAGING --> STAGED --> PERSISTING --> COMMITTED
   |           |           |           |
   +-----------+-----------+-----------+--> FAILED          (PLANNED --> SKIPPED: arena.when_full is "skip")
               +-----------+-----------+--> CANCELLED       (delete() was called)

Two views of it: ``Save`` for the threads that take part, and ``SaveHandle`` for the user. Each step forward is an event
(``telemetry/event.py``), which is posted before the Future of the step is done: who waits for the Future and closes the
Checkpointer then knows that the listeners get the event.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Generic, TypeVar

from stager.exporting.weights import ExportedWeights
from stager.saving.destination import Destination
from stager.saving.sidecars import NO_SIDECARS, Sidecars
from stager.telemetry.event import (
    CancelledEvent,
    CommittedEvent,
    Event,
    FailedEvent,
    PlannedEvent,
    SkippedEvent,
    StagedEvent,
    WrittenEvent,
)
from stager.telemetry.report import SaveReport, SaveState
from stager.telemetry.timeline import Timeline
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.commit.persist import PartResult
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.errors import InternalError

T = TypeVar("T")

_TRANSITIONS = {
    SaveState.PLANNED: {SaveState.STAGING, SaveState.FAILED, SaveState.SKIPPED},
    SaveState.STAGING: {SaveState.STAGED, SaveState.FAILED, SaveState.CANCELLED},
    SaveState.STAGED: {SaveState.PERSISTING, SaveState.FAILED, SaveState.CANCELLED},
    SaveState.PERSISTING: {SaveState.COMMITTED, SaveState.FAILED, SaveState.CANCELLED},
    SaveState.COMMITTED: set(),
    SaveState.FAILED: set(),
    SaveState.SKIPPED: set(),
    SaveState.CANCELLED: set(),
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

    Args:
        number: of this save, among those that the trainer has begun.
        post: gets what makes each event, if somebody listens (``Listeners.post``).
        destination: where the checkpoint will be.
        metrics, sidecars: to be kept with the checkpoint.

    Attributes:
        step, save_id: which save; the id is the same on all ranks.
        timeline: its timings and notes.
        staging_completion, upload_completion, export_completion: see :class:`~stager.SaveHandle`.
    """

    def __init__(
        self,
        step: int,
        save_id: str,
        number: int,
        post: Callable[[Callable[[], Event]], None],
        destination: Destination,
        metrics: Mapping[str, float],
        sidecars: Sidecars = NO_SIDECARS,
    ) -> None:
        self.step = step
        self.save_id = save_id
        self.number = number
        self.destination = destination
        self.metrics = metrics
        self.sidecars = sidecars
        self.is_withdrawn = False  # by delete(): if it is not committed yet, it will not be
        self._post = post
        self.timeline = Timeline(step, save_id)
        self.staging_completion: ReadTrackingFuture[None] = ReadTrackingFuture()
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = ReadTrackingFuture()
        self.export_completion: Future[ExportedWeights] | None = None
        self._report = SaveReport(step, SaveState.PLANNED)
        self._num_parts = self._num_parts_done = 0
        self._lock = threading.Lock()

    @property
    def state(self) -> SaveState:
        """How far the save is."""
        return self._report.state

    @property
    def shown(self) -> str:
        """The save for a message: by its step, if its directory has the default name."""
        is_default = self.destination.name_in_spec(self.step) == ""
        return f"step {self.step}" if is_default else self.destination.name

    @property
    def report(self) -> SaveReport:
        """The figures so far."""
        with self._lock:
            return replace(self._report, timings=self.timeline.timings, notes=self.timeline.notes)

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

    @property
    def error(self) -> BaseException | None:
        """Why the save failed; None if it has not. Does not count as read by the user."""
        upload = self.upload_completion
        return Future.exception(upload) if upload.done() and not upload.cancelled() else None

    def watch_parts(self, parts: Sequence[Future[PartResult]]) -> None:
        """Count these parts, which the workers have, in :attr:`parts`."""
        with self._lock:
            self._num_parts += len(parts)
        for part in parts:  # the save does not hold them: their callbacks hold slabs, and the save
            part.add_done_callback(self._part_done)

    def _part_done(self, _: Future[PartResult]) -> None:
        with self._lock:
            self._num_parts_done += 1

    @property
    def parts(self) -> tuple[int, int]:
        """How many of this rank's parts the workers have finished, and how many they have been given."""
        with self._lock:
            return self._num_parts_done, self._num_parts

    def planned(self, **figures: Any) -> None:
        """Fill in what the plan says."""
        self.record(**figures)
        self._post(lambda: PlannedEvent(report=self.report))

    def complete_staging(self) -> None:
        """Resolve ``staging_completion``: the snapshot is whole, and the workers have it."""
        self.record(staged_secs=self.elapsed_secs())
        self._post(lambda: StagedEvent(report=self.report))
        self.staging_completion.set_result(None)

    def written(self, results: Sequence[PartResult]) -> None:
        """Fill in when this rank's parts were written and synced.

        Args:
            results: of the parts, all that this rank has.
        """
        timing, since = self.timeline.timing, self.timeline.started
        for result in results:
            timing("write", result.started, result.written, f"worker {result.pid}")
            timing("sync", result.written, result.synced, f"worker {result.pid}")
        for note in dict.fromkeys(result.note for result in results if result.note):
            self.timeline.note(note)
        self.record(
            written_secs=max(result.written for result in results) - since,
            synced_secs=max(result.synced for result in results) - since,
        )
        self._post(lambda: WrittenEvent(report=self.report))

    def skip(self) -> None:
        """End the save before it began: every slab was in use, and the user asked to skip then."""
        self.move(SaveState.SKIPPED)
        self._post(lambda: SkippedEvent(report=self.report))
        self.staging_completion.set_result(None)
        self.upload_completion.cancel()
        self.upload_completion.set_running_or_notify_cancel()

    def cancel(self) -> None:
        """End the save without a checkpoint, because that was deleted."""
        self.move(SaveState.CANCELLED)
        self._post(lambda: CancelledEvent(report=self.report))
        if not self.staging_completion.done():
            self.staging_completion.set_result(None)
        self.upload_completion.cancel()
        self.upload_completion.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """End the save with an error."""
        self.move(
            SaveState.FAILED
        )  # first: two threads may try to end a save, and only one of them gets past this line
        self._post(lambda: FailedEvent(report=self.report, error=error))
        if not self.staging_completion.done():
            self.staging_completion.set_exception(error)
            self.staging_completion.was_read = True  # upload_completion has the same error: raise it once
        self.upload_completion.set_exception(error)

    def commit(self, committed: Committed) -> None:
        """End the save: the checkpoint of all ranks is committed."""
        self.timeline.timing("commit", committed.started, committed.ended, f"worker {committed.pid}")
        since, info = self.timeline.started, committed.info
        with self._lock:  # None where a worker wrote a part and died before it could say so
            written, synced = self._report.written_secs, self._report.synced_secs
        self.record(
            written_secs=committed.ended - since if written is None else written,
            synced_secs=committed.ended - since if synced is None else synced,
            committed_secs=committed.ended - since,
            linked_bytes=info.linked_bytes,
            written_bytes=info.nbytes - info.linked_bytes,
        )
        # The figures are whole before the Future is done: whoever waited for it may read the report.
        self.move(SaveState.COMMITTED)
        self._post(lambda: CommittedEvent(report=self.report, info=info))
        self.upload_completion.set_result(info)


class SaveHandle:
    """One save, as :meth:`stager.Checkpointer.save` returns it.

    Attributes:
        step: the training step.
        save_id: a nonce, the same on all ranks that save together; it names the partial directory.
        staging_completion: resolves when the snapshot is whole and the workers have it. From then on the state may be
            mutated, and the checkpoint will be committed even if this process is killed.
        upload_completion: resolves to the :class:`~stager.CheckpointInfo` when the checkpoint is durable and committed.
            Its exception says why the save failed. It is cancelled when the save was skipped, or its checkpoint was
            deleted.
        export_completion: resolves to the :class:`~stager.ExportedWeights` when the weights are exported. Its exception
            says why they were not; if the save failed, it is that of ``upload_completion``. It is cancelled with the save,
            and you may cancel it until the checkpoint is committed. None: no export was asked for, or this is not rank 0.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self.step: int = save.step
        self.save_id: str = save.save_id
        self.staging_completion: ReadTrackingFuture[None] = save.staging_completion
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = save.upload_completion
        self.export_completion: Future[ExportedWeights] | None = save.export_completion

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
