"""The trainer's tensors in shared memory, and the copy from them into a slab by workers.

    trainer                                    |  shared memory   |  worker
    SharedSource.of(id, storage) --pickled---->|                  |  attached read-only, once for each id
    copy_shared(slab, sources, stretches) ---->|  source -> slab  |  bounds checked, then copied without any lock
                                               |                  |  -> CopyResult

The trainer's Future tells that a copy is done. It fails only when the worker that copied is dead and reaped, so that no
process writes into the slab any more. Another worker can then copy again: the same bytes go to the same places, because the
trainer keeps the source unchanged meanwhile.

Invariant: a worker never writes to a source. Its mapping is read-only: a mistake here ends the worker, and does not change a
parameter.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from stager.workers.errors import InternalError
from stager.workers.faults import point
from stager.workers.memory.attached import Memory, ReadOnlyMapping

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 16 << 20


class Stretch(NamedTuple):
    """Bytes to copy. ``source``: index of the source in the task."""

    source: int
    source_offset: int
    slab_offset: int
    nbytes: int


class SharedSource:
    """One storage of the trainer, in shared memory.

    Attributes:
        source_id: unique in the trainer's process.
        address: of the first byte, in this process.
    """

    __slots__ = ("__weakref__", "_memory", "address", "nbytes", "source_id")

    def __init__(
        self, source_id: int, address: int, nbytes: int, memory: torch.UntypedStorage | ReadOnlyMapping
    ) -> None:
        self.source_id = source_id
        self.address = address
        self.nbytes = nbytes
        self._memory = memory  # the storage in the trainer, the mapping in a worker

    @staticmethod
    def of(source_id: int, storage: torch.UntypedStorage) -> SharedSource:
        """In the trainer: make one of a storage that has a descriptor of its own. It lives as long as this object."""
        return SharedSource(source_id, storage.data_ptr(), storage.nbytes(), storage)

    def __reduce__(self) -> tuple[Any, ...]:
        storage = self._memory
        if isinstance(storage, ReadOnlyMapping) or storage.data_ptr() != self.address:
            raise InternalError(f"the memory of source {self.source_id} was moved after it was shared")
        fd, nbytes = storage._share_fd_cpu_()  # torch.multiprocessing's own call; shared already, so nothing moves
        return _attach, (self.source_id, reduction.DupFd(fd), nbytes)


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What :func:`copy_shared` returns: who copied how many bytes, from when to when (``time.time()``)."""

    pid: int
    started: float
    ended: float
    nbytes: int


def copy_shared(
    slab: Memory, sources: Sequence[SharedSource], stretches: Sequence[Stretch], live_sources: frozenset[int]
) -> CopyResult:
    """Copy ``stretches`` from ``sources`` into ``slab``. Runs in a worker.

    Args:
        live_sources: ids of all sources that the trainer still has; the others are unmapped.

    Raises:
        InternalError: a stretch is not inside its source, or not inside the slab. Nothing was written then.
    """
    started = time.time()
    point("copy.begin")
    detach_all_but(live_sources)
    check_stretches(slab, sources, stretches)
    copy_stretches(slab, sources, stretches)
    point("copy.done")
    return CopyResult(os.getpid(), started, time.time(), sum(stretch.nbytes for stretch in stretches))


def check_stretches(slab: Memory, sources: Sequence[SharedSource], stretches: Sequence[Stretch]) -> None:
    """Check all before the first byte is written: a task that is wrong in any part must not change the slab.

    Raises:
        InternalError: a stretch is not inside its source, or not inside the slab.
    """
    for stretch in stretches:
        _check(stretch, sources, slab)


def copy_stretches(slab: Memory, sources: Sequence[SharedSource], stretches: Sequence[Stretch]) -> None:
    """Copy what :func:`check_stretches` has checked, a piece at a time, without the GIL."""
    for index, offset, slab_offset, nbytes in stretches:
        for start, end in _pieces(slab_offset, slab_offset + nbytes):
            point("copy.piece")
            _populate(slab, start)
            ctypes.memmove(slab.address + start, sources[index].address + offset + start - slab_offset, end - start)


def _check(stretch: Stretch, sources: Sequence[SharedSource], slab: Memory) -> None:
    index, offset, slab_offset, nbytes = stretch
    inside = (
        nbytes >= 0
        and 0 <= index < len(sources)
        and 0 <= offset <= sources[index].nbytes - nbytes
        and 0 <= slab_offset <= slab.nbytes - nbytes
    )
    if not inside:
        sizes = [source.nbytes for source in sources]
        raise InternalError(
            f"a worker was to copy {stretch}, which is not inside the sources of {sizes} bytes or the slab of "
            f"{slab.nbytes} bytes; nothing was copied"
        )


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """A range of a slab, cut at multiples of 16 MiB."""
    while start < end:
        stop = min(end, start - start % _PIECE_BYTES + _PIECE_BYTES)
        yield start, stop
        start = stop


# Which pieces of a slab are in this process's page table. Page faults one by one would take three times as long as
# populating; populating pages that are there would add a sixth to the time of each copy.
_populated: WeakKeyDictionary[Memory, set[int]] = WeakKeyDictionary()


def _populate(slab: Memory, offset: int) -> None:
    number = offset // _PIECE_BYTES
    done = _populated.setdefault(slab, set())
    if number not in done:
        start = number * _PIECE_BYTES
        slab.populate(start, min(_PIECE_BYTES, slab.nbytes - start))
        done.add(number)


# Mapping a source again for every save would fault its pages in again. The descriptor travels with each task all the same,
# because any worker may get the task.
_attached: dict[int, SharedSource] = {}


def _attach(source_id: int, sent_fd: Any, nbytes: int) -> SharedSource:
    fd = sent_fd.detach()
    try:
        source = _attached.get(source_id)
        if source is None:
            memory = ReadOnlyMapping(fd, nbytes)
            source = _attached[source_id] = SharedSource(source_id, memory.address, nbytes, memory)
        return source
    finally:
        os.close(fd)


def detach_all_but(live: frozenset[int]) -> None:
    """In a worker: unmap the attached sources that the trainer no longer has. That frees their memory."""
    for source_id in _attached.keys() - live:
        del _attached[source_id]
