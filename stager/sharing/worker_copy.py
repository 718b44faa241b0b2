"""Copies from shared sources into a slab, dealt to the workers by bytes.

Each worker gets as many equal tasks, one if that is not too large: messages cost time (for 1.5 GiB, 24 tasks took a
quarter more processor time than two). Only idle workers are asked: one that still writes the last checkpoint would begin in
seconds, and what waits for the copy (``save()``, or the optimizer's next step) waits for the slowest part.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from stager.state.snapshot_plan import Copy
from stager.workers.errors import WorkerError
from stager.workers.memory.shared_source import CopyResult, SharedSource, Stretch, copy_shared
from stager.workers.memory.slab import Slab
from stager.workers.pool.handle import WorkerState
from stager.workers.pool.pool import WorkerPool

_TASK_BYTES = 1 << 30  # beyond, an idle worker can do a part of what a slow one has not begun
# Of a worker, or of the way to it; the bytes that were asked for are still right, and the trainer can copy them.
_UNAVAILABLE = (WorkerError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was done for one snapshot.

    Attributes:
        results: of the workers' tasks.
        notes: for the save's report: what the trainer had to copy itself, and why.
    """

    results: tuple[CopyResult, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedCopy:
    """A copy, and the source that it lies in."""

    copy: Copy
    source: SharedSource


@dataclass(frozen=True, slots=True)
class _Piece:
    """``nbytes`` bytes at ``offset`` of a copy."""

    shared: SharedCopy
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Task:
    pieces: list[_Piece]
    future: Future[CopyResult] | None = None


class WorkerCopier:
    """Has workers copy.

    Args:
        pool: whose workers copy.
        num_workers: most that copy at a time.
    """

    def __init__(self, pool: WorkerPool, num_workers: int) -> None:
        self._pool = pool
        self._num_workers = num_workers

    def copy(
        self,
        shared: Sequence[SharedCopy],
        slab: Slab,
        live_sources: frozenset[int],
        copy_here: Callable[[list[Copy]], None],
        meanwhile: Sequence[Copy],
    ) -> Copied:
        """Returns when every byte is in the slab. Raises, and returns, only when no worker writes into it any more.

        Args:
            live_sources: see :func:`stager.workers.memory.shared_source.copy_shared`.
            copy_here, meanwhile: see :meth:`stager.sharing.SourceSharer.copy`.
        """
        num_workers = min(self._num_workers, self._count_idle()) if shared else 0
        if num_workers == 0:
            copy_here([*meanwhile, *(s.copy for s in shared)])
            return Copied(notes=(_note(shared, "no worker was idle"),) if shared else ())
        tasks = _deal(shared, num_workers)
        try:
            failure = self._submit(tasks, slab, live_sources)
            if meanwhile:
                copy_here(list(meanwhile))
        finally:
            _wait(tasks)
        return _finish(tasks, failure, copy_here)

    def _count_idle(self) -> int:
        return sum(worker.state is WorkerState.READY and not worker.tasks for worker in self._pool.health())

    def _submit(self, tasks: list[_Task], slab: Slab, live_sources: frozenset[int]) -> Exception | None:
        """Why not all tasks could be sent, or None. Whatever interrupts it, each task that a worker has has its Future."""
        task = tasks[0]
        try:
            for task in tasks:
                sources, stretches = _describe(task.pieces)
                task.future = Future()
                self._pool.submit_to(task.future, copy_shared, slab, sources, stretches, live_sources)
        except _UNAVAILABLE as error:  # out of descriptors, say
            if task.future is not None and task.future.cancel():
                task.future = None
            return error
        except BaseException:
            _cancel(tasks)
            raise
        return None


def _cancel(tasks: Iterable[_Task]) -> None:
    """Those that no worker has."""
    for task in tasks:
        if task.future is not None:
            task.future.cancel()


def _deal(shared: Sequence[SharedCopy], num_workers: int) -> list[_Task]:
    """Tasks of the same bytes (but the last), as many for each worker."""
    total = sum(s.copy.nbytes for s in shared)
    num_tasks = num_workers * -(-total // (num_workers * _TASK_BYTES))
    task_bytes = -(-total // (num_tasks * mmap.PAGESIZE)) * mmap.PAGESIZE
    tasks: list[_Task] = []
    room = 0
    for one in shared:
        offset = 0
        while offset < one.copy.nbytes:
            if room == 0:
                tasks.append(_Task([]))
                room = task_bytes
            nbytes = min(room, one.copy.nbytes - offset)
            tasks[-1].pieces.append(_Piece(one, offset, nbytes))
            offset += nbytes
            room -= nbytes
    return tasks


def _describe(pieces: Iterable[_Piece]) -> tuple[list[SharedSource], list[Stretch]]:
    """A task's arguments: the sources that it needs, and stretches that number them."""
    sources: dict[int, SharedSource] = {}
    numbers: dict[int, int] = {}
    stretches: list[Stretch] = []
    for piece in pieces:
        source, copy = piece.shared.source, piece.shared.copy
        sources[source.source_id] = source
        number = numbers.setdefault(source.source_id, len(numbers))
        start = copy.address - source.address + piece.offset
        stretches.append((number, start, copy.slab_offset + piece.offset, piece.nbytes))
    return list(sources.values()), stretches


def _wait(tasks: Sequence[_Task]) -> None:
    """Until none of them runs, whatever happens: a worker that writes into a slab that was given back would spoil the next
    snapshot. On Ctrl-C those that wait for a worker are cancelled; those that run end in a moment."""
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


def _finish(tasks: list[_Task], failure: BaseException | None, copy_here: Callable[[list[Copy]], None]) -> Copied:
    """Nothing runs any more: the trainer copies what was not done, and says so."""
    results: list[CopyResult] = []
    left: dict[int, SharedCopy] = {}
    for task in tasks:
        error = task.future.exception() if task.future is not None else failure
        if error is not None and not isinstance(error, _UNAVAILABLE):
            raise error
        if error is not None:
            failure = error
            left.update((id(piece.shared), piece.shared) for piece in task.pieces)
        elif task.future is not None:
            results.append(task.future.result())
    if not left:
        return Copied(tuple(results))
    copy_here([shared.copy for shared in left.values()])
    return Copied(tuple(results), (_note(list(left.values()), f"{type(failure).__name__}: {failure}"),))


def _note(shared: Sequence[SharedCopy], reason: str) -> str:
    nbytes = sum(s.copy.nbytes for s in shared)
    return f"{nbytes:,} bytes in shared memory copied by the trainer: {reason}"
