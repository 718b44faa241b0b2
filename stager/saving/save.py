"""One save: its state, its Futures, its times. No I/O here.

PLANNED --> STAGING --> STAGED --> PERSISTING --> COMMITTED
   |           |           |           |
   +-----------+-----------+-----------+--> FAILED          (PLANNED --> SKIPPED: arena.when_full is "skip")
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.commit.persist import PartResult
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.errors import InternalError

T = TypeVar("T")


class SaveState(Enum):
    PLANNED = "planned"
    STAGING = "staging"
    STAGED = "staged"
    PERSISTING = "persisting"
    COMMITTED = "committed"
    FAILED = "failed"
    SKIPPED = "skipped"


_TRANSITIONS = {
    SaveState.PLANNED: {SaveState.STAGING, SaveState.FAILED, SaveState.SKIPPED},
    SaveState.STAGING: {SaveState.STAGED, SaveState.FAILED},
    SaveState.STAGED: {SaveState.PERSISTING, SaveState.FAILED},
    SaveState.PERSISTING: {SaveState.COMMITTED, SaveState.FAILED},
    SaveState.COMMITTED: set(),
    SaveState.FAILED: set(),
    SaveState.SKIPPED: set(),
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time: ``start`` and ``end`` are ``time.time()``; ``process`` is "trainer" or "worker <pid>"."""

    name: str
    process: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save cost. Times are seconds since ``save()`` was called; None: not reached (yet).

    Attributes:
        step, state: which save, and how far it is.
        nbytes: of the tensors and pickled objects.
        num_tensors, num_objects: items; tied tensors count once.
        blocked_secs: how long the call of ``save()`` took, the training thread's loss.
        staged_secs: until the snapshot was whole and handed over.
        written_secs, synced_secs, committed_secs: until the last byte was written, synced, and the checkpoint visible.
        written_bytes, linked_bytes: of the checkpoint's files, what was written, and what was linked to an earlier one's
            because it had not changed (``persistence.incremental``). None: not committed.
        events: what happened when, in which process.
        notes: what is worth knowing about how this save was done.
    """

    step: int
    state: str
    nbytes: int
    num_tensors: int
    num_objects: int
    blocked_secs: float | None
    staged_secs: float | None
    written_secs: float | None
    synced_secs: float | None
    committed_secs: float | None
    written_bytes: int | None
    linked_bytes: int | None
    events: tuple[Event, ...]
    notes: tuple[str, ...]


class ReadTrackingFuture(Future[T], Generic[T]):
    """A Future that knows whether its exception reached anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read = False

    def result(self, timeout: float | None = None) -> T:
        error = super().exception(timeout)
        self.was_read = True
        if error is not None:
            raise error
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self.was_read = True
        return error

    def unread_error(self) -> BaseException | None:
        """The exception, if there is one and nobody has seen it."""
        if self.was_read or not self.done() or self.cancelled():
            return None
        return super().exception()


@dataclass(slots=True)
class _Times:
    started: float
    blocked: float | None = None
    staged: float | None = None
    written: float | None = None
    synced: float | None = None
    committed: float | None = None
    events: list[Event] = field(default_factory=list)


class SaveHandle:
    """What ``save()`` returns.

    Attributes:
        step: the training step.
        staging_completion: resolves when the snapshot is whole and the workers have it: the state may be mutated, and
            the checkpoint will be committed even if this process is killed.
        upload_completion: resolves to the :class:`~stager.CheckpointInfo` when the checkpoint is durable and
            committed; its exception says why it is not. Cancelled when the save was skipped.
    """

    def __init__(self, step: int, save_id: str) -> None:
        self.step = step
        self.save_id = save_id
        self.staging_completion: ReadTrackingFuture[None] = ReadTrackingFuture()
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = ReadTrackingFuture()
        self._state = SaveState.PLANNED
        self._lock = threading.Lock()
        self._times = _Times(time.time())
        self._nbytes = self._num_tensors = self._num_objects = 0
        self._written_bytes: int | None = None
        self._linked_bytes: int | None = None
        self._notes: list[str] = []

    @property
    def state(self) -> SaveState:
        return self._state

    @property
    def report(self) -> SaveReport:
        """The figures so far; final once ``upload_completion`` is done."""
        with self._lock:
            times = self._times
            return SaveReport(
                step=self.step,
                state=self._state.value,
                nbytes=self._nbytes,
                num_tensors=self._num_tensors,
                num_objects=self._num_objects,
                blocked_secs=self._since(times.blocked),
                staged_secs=self._since(times.staged),
                written_secs=self._since(times.written),
                synced_secs=self._since(times.synced),
                committed_secs=self._since(times.committed),
                written_bytes=self._written_bytes,
                linked_bytes=self._linked_bytes,
                events=tuple(times.events),
                notes=tuple(self._notes),
            )

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self._state.value}>"

    # -- for the Saver ------------------------------------------------------------------------------------------

    def _move(self, to: SaveState) -> None:
        with self._lock:
            if to not in _TRANSITIONS[self._state]:
                raise InternalError(f"save of step {self.step} cannot go from {self._state.value} to {to.value}")
            self._state = to

    def _describe(self, nbytes: int, num_tensors: int, num_objects: int) -> None:
        with self._lock:
            self._nbytes, self._num_tensors, self._num_objects = nbytes, num_tensors, num_objects

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)

    def _event(self, name: str, start: float, end: float | None = None, process: str = "trainer") -> None:
        with self._lock:
            self._times.events.append(Event(name, process, start, time.time() if end is None else end))

    def event(self, name: str, start: float) -> None:
        """Record a step of this save that took from ``start`` (seconds since the epoch) until now."""
        self._event(name, start)

    def _unblocked(self) -> None:
        with self._lock:
            self._times.blocked = time.time()

    def _staged(self) -> None:
        with self._lock:
            self._times.staged = time.time()
        self.staging_completion.set_result(None)

    def _skipped(self) -> None:
        self._move(SaveState.SKIPPED)
        self.staging_completion.set_result(None)
        self.upload_completion.cancel()
        self.upload_completion.set_running_or_notify_cancel()

    def _fail(self, error: BaseException) -> None:
        self._move(SaveState.FAILED)
        if not self.staging_completion.done():
            self.staging_completion.set_exception(error)
            self.staging_completion.was_read = True  # the same error is in upload_completion: raise it once
        self.upload_completion.set_exception(error)

    def _commit(self, results: list[PartResult], committed: Committed) -> None:
        """
        Args:
            results: of this rank's parts.
        """
        for result in results:
            process = f"worker {result.pid}"
            self._event("write", result.started, result.written, process)
            self._event("sync", result.written, result.synced, process)
        self._event("commit", committed.started, committed.ended, f"worker {committed.pid}")
        with self._lock:
            self._times.written = max((r.written for r in results), default=committed.ended)
            self._times.synced = max((r.synced for r in results), default=committed.ended)
            self._times.committed = committed.ended
            self._linked_bytes = committed.info.linked_bytes
            self._written_bytes = committed.info.nbytes - committed.info.linked_bytes  # of all ranks
            self._notes += dict.fromkeys(result.note for result in results if result.note)
        self._move(SaveState.COMMITTED)
        self.upload_completion.set_result(committed.info)

    def _since(self, stamp: float | None) -> float | None:
        return None if stamp is None else stamp - self._times.started
