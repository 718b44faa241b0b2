"""Copies from shared sources into a slab, divided among the idle workers by bytes.

Each worker gets the same number of equal tasks; one, if that is not too large. Messages cost time: for 1.5 GiB, 24 tasks
took a quarter more processor time than two. Only idle workers get tasks. A worker that still writes the last checkpoint
would begin seconds later, and ``save()``, or the optimizer's next step, waits for the slowest task.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from stager.state.copies import Copy
from stager.workers.errors import WorkerError
from stager.workers.memory.shared_source import CopyResult, SharedSource, Stretch, copy_shared
from stager.workers.memory.slab import Slab
from stager.workers.pool.handle import WorkerState
from stager.workers.pool.pool import WorkerPool

_TASK_BYTES = 1 << 30  # no larger, so that an idle worker can take a task that a slow one has not begun
# The fault of a worker, or of the way to it. The bytes are where they were, and the trainer can copy them.
_UNAVAILABLE = (WorkerError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was done for one snapshot. ``notes``: what the trainer had to copy itself, and why; for the save's report."""

    results: tuple[CopyResult, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedCopy:
    """A copy, and the shared source in which the memory to copy lies."""

    copy: Copy
    source: SharedSource


@dataclass(slots=True)
class CopyTask:
    """What one worker is asked to copy.

    Attributes:
        sources: by id, in the order of their numbers.
        numbers: the position in ``sources`` of each source, by id: a stretch names its source by it.
        stretches: the bytes to copy.
        copies: those that the stretches belong to; a large copy is divided among several tasks.
        future: None if no worker was given the task.
    """

    sources: dict[int, SharedSource] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    future: Future[CopyResult] | None = None

    def add(self, shared: SharedCopy, offset: int, nbytes: int) -> None:
        """Add ``nbytes`` bytes of a copy, from its byte ``offset`` on."""
        source, copy = shared.source, shared.copy
        self.sources[source.source_id] = source
        number = self.numbers.setdefault(source.source_id, len(self.numbers))
        self.stretches.append(
            Stretch(
                source=number,
                source_offset=copy.address - source.address + offset,
                slab_offset=copy.slab_offset + offset,
                nbytes=nbytes,
            )
        )
        self.copies.append(copy)


class WorkerCopier:
    """Has at most ``num_workers`` workers of ``pool`` copy at a time."""

    def __init__(self, pool: WorkerPool, num_workers: int) -> None:
        self._pool = pool
        self._num_workers = num_workers

    def copy(
        self,
        shared: Sequence[SharedCopy],
        slab: Slab,
        live_sources: frozenset[int],
        copy_here: Callable[[list[Copy]], None],
        meanwhile: Callable[[], None],
    ) -> Copied:
        """Return when every byte is in the slab. Return, or raise, only when no worker writes into the slab any more.

        Args:
            live_sources: see :func:`stager.workers.memory.shared_source.copy_shared`.
            copy_here, meanwhile: see :meth:`stager.sharing.sharer.SourceSharer.copy`.
        """
        num_workers = min(self._num_workers, self._count_idle()) if shared else 0
        if num_workers == 0:
            meanwhile()
            if not shared:
                return Copied()
            copies = [s.copy for s in shared]
            copy_here(copies)
            return Copied(notes=(_note(copies, "no worker was idle"),))
        tasks = divide(shared, num_workers)
        try:
            # 1. The workers begin before the trainer does its part.
            failure = self._submit(tasks, slab, live_sources)
            meanwhile()
        finally:
            # 2. Also after an error or Ctrl-C: a worker that writes after the lease has ended would spoil the next snapshot.
            _wait(tasks)
        # 3. Now only the trainer writes: it copies what no worker did.
        return _finish(tasks, failure, copy_here)

    def _count_idle(self) -> int:
        return sum(worker.state is WorkerState.READY and not worker.tasks for worker in self._pool.health())

    def _submit(self, tasks: list[CopyTask], slab: Slab, live_sources: frozenset[int]) -> Exception | None:
        """Send the tasks; return why not all could be sent, or None."""
        task = tasks[0]
        try:
            for task in tasks:
                task.future = Future()  # before the task is sent: Ctrl-C must not leave a running task without a Future
                self._pool.submit_to(
                    task.future, copy_shared, slab, list(task.sources.values()), task.stretches, live_sources
                )
        except _UNAVAILABLE as error:  # out of descriptors, say
            if task.future is not None and task.future.cancel():
                task.future = None
            return error
        except BaseException:
            _cancel(tasks)
            raise
        return None


def _cancel(tasks: Iterable[CopyTask]) -> None:
    """Cancel those that no worker has begun."""
    for task in tasks:
        if task.future is not None:
            task.future.cancel()


def divide(shared: Sequence[SharedCopy], num_workers: int) -> list[CopyTask]:
    """Make tasks of equal bytes (but the last), and of the same number for each worker."""
    total = sum(s.copy.nbytes for s in shared)
    num_tasks = num_workers * -(-total // (num_workers * _TASK_BYTES))
    task_bytes = -(-total // (num_tasks * mmap.PAGESIZE)) * mmap.PAGESIZE
    tasks: list[CopyTask] = []
    room = 0
    for one in shared:
        offset = 0
        while offset < one.copy.nbytes:
            if room == 0:
                tasks.append(CopyTask())
                room = task_bytes
            nbytes = min(room, one.copy.nbytes - offset)
            tasks[-1].add(one, offset, nbytes)
            offset += nbytes
            room -= nbytes
    return tasks


def _wait(tasks: Sequence[CopyTask]) -> None:
    """Wait until none of them runs. Ctrl-C cancels those that wait for a worker; those that run end in a moment."""
    interrupt: BaseException | None = None
    while True:
        try:
            wait([task.future for task in tasks if task.future is not None and not task.future.cancelled()])
            break
        except BaseException as error:  # noqa: BLE001  (KeyboardInterrupt; raised below)
            interrupt = error
            _cancel(tasks)
    if interrupt is not None:
        raise interrupt


def _finish(tasks: list[CopyTask], failure: BaseException | None, copy_here: Callable[[list[Copy]], None]) -> Copied:
    """Collect the results. The trainer copies what no worker did, and notes it."""
    results: list[CopyResult] = []
    left: dict[int, Copy] = {}
    for task in tasks:
        error = task.future.exception() if task.future is not None else failure
        if error is not None and not isinstance(error, _UNAVAILABLE):
            raise error
        if error is not None:
            failure = error
            left.update((id(copy), copy) for copy in task.copies)  # a large copy is in several tasks
        elif task.future is not None:
            results.append(task.future.result())
    if not left:
        return Copied(tuple(results))
    copies = list(left.values())
    copy_here(copies)
    return Copied(tuple(results), (_note(copies, f"{type(failure).__name__}: {failure}"),))


def _note(copies: Sequence[Copy], reason: str) -> str:
    return f"{sum(copy.nbytes for copy in copies):,} bytes in shared memory copied by the trainer: {reason}"
