"""``staging.location``: which sources lie in shared memory, and their copy into the slab by the workers.

    share()   before planning: large CPU storages into shared memory (``movable.py``), or those that are there noticed
    split()   which copies of a plan the workers can do
    copy()    deal them by bytes -> idle workers copy -> all done, or the trainer does the rest

Invariants
  * A user's memory is held weakly; a storage that is gone is forgotten, and the workers are told to unmap it.
  * A source is used for a copy only if its tensor's storage is, at that moment, the one that was shared, where it was.
  * When ``copy`` returns, or raises, no worker writes into the slab any more.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor the weak references to them)

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stager.sharing.movable import Reason, move, sendable, why_not
from stager.sharing.worker_copy import Copied, SharedCopy, WorkerCopier
from stager.state.snapshot_plan import Copy
from stager.workers.errors import ClosedError, InternalError, WorkerError
from stager.workers.memory.host_buffers import default_fd_budget
from stager.workers.memory.shared_source import SharedSource, detach_all_but, prepare_copy
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import WorkerPool

Location = Literal["auto", "trainer", "workers"]

_MIN_COPY_BYTES = 64 << 10  # below, telling a worker costs as much as copying
_MIN_ELEMENTS = _MIN_COPY_BYTES // 16  # of the largest dtype: cheap to ask of 20,000 tensors

_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """Attributes:
    location: ``staging.location``.
    min_bytes: smaller storages are left alone.
    fd_budget: storages that are shared at a time, each with a descriptor; None: an eighth of ``ulimit -n``.
    """

    location: Location = "auto"
    min_bytes: int = 1 << 20
    fd_budget: int | None = None

    @property
    def may_move(self) -> bool:
        """Whether the user's memory may be moved: only if they said so."""
        return self.location == "workers"

    def may_copy(self, *, guarded: bool) -> bool:
        """Whether workers copy what lies in shared memory.

        The rule of ``auto``: large CPU tensors that are in shared memory anyway (``model.share_memory()``), and only when
        they are guarded, so that training goes on meanwhile. For what ``save()`` waits for there are the trainer's own
        threads, which are not niced. CUDA tensors, small ones and all others are the trainer's, wherever the copy runs.
        """
        return self.location == "workers" or (self.location == "auto" and guarded)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A storage in shared memory. ``weak`` keeps its ``StorageImpl``'s address from being used again, not its memory."""

    source_id: int
    weak: StorageWeakRef
    address: int
    nbytes: int

    def is_still(self, storage: torch.UntypedStorage) -> bool:
        return bool(storage.data_ptr() == self.address and storage.nbytes() == self.nbytes)

    def contains(self, copy: Copy) -> bool:
        return self.address <= copy.address and copy.address + copy.nbytes <= self.address + self.nbytes

    def storage(self) -> torch.UntypedStorage | None:
        """The storage, while it lives and is where it was."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        return storage if storage is not None and self.is_still(storage) else None


class SourceSharer:
    """Knows the sources that workers can read, and has them copy.

    Args:
        pool: whose workers copy.
        num_parts: most workers that copy one snapshot at a time.
        options: see :class:`SharingOptions`.
    """

    def __init__(self, pool: WorkerPool, num_parts: int, options: SharingOptions) -> None:
        self._pool = pool
        self._num_parts = num_parts
        self._copier = WorkerCopier(pool, num_parts)
        self._options = options
        self._fd_budget = default_fd_budget() if options.fd_budget is None else options.fd_budget
        self._entries: dict[int, _Entry] = {}  # by address of the StorageImpl
        self._refused: dict[Reason, list[int]] = {}
        self._lock = threading.Lock()  # the trainer's thread and the staging thread both ask

    # -- before planning ----------------------------------------------------------------------------------------

    def share(self, leaves: Sequence[Any], may_move: bool) -> bool:
        """Find, or put, the large CPU storages of ``leaves`` into shared memory. The largest come first.

        Changes addresses, so it is called before planning.

        Args:
            leaves: of the state, in order; what is no tensor is passed over.
            may_move: no snapshot is being taken; see NOTE [ What a move changes ]. Nothing is moved all the same unless the
                user asked for it: :attr:`SharingOptions.may_move`.

        Returns:
            Whether addresses may have changed, so that the snapshot has to be planned again.
        """
        may_move = may_move and self._options.may_move
        with self._lock:
            self._forget_the_dead()
            self._refused = {}
            found = self._find(leaves)
            shared = [i for i, storage in found if storage.is_shared()]
            storages = dict(found)
            reasons = sendable([storages[i] for i in shared]) if shared else []
            for leaf, reason in zip(shared, reasons, strict=True):
                self._enter(leaf, storages[leaf], reason or self._check_budget())
            for leaf, storage in found:
                if not storage.is_shared():
                    self._enter(leaf, storage, self._move(leaves[leaf], may_move))
        return True

    def _find(self, leaves: Sequence[Any]) -> list[tuple[int, torch.UntypedStorage]]:
        """(leaf, storage) of every large CPU storage that is not known, once each, largest first."""
        found: dict[int, tuple[int, torch.UntypedStorage]] = {}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor) or leaf.numel() < _MIN_ELEMENTS or not _is_on_cpu(leaf):
                continue
            storage = leaf.untyped_storage()
            if storage.nbytes() < self._options.min_bytes or storage._cdata in found:
                continue
            entry = self._entries.get(storage._cdata)
            if entry is not None and not entry.is_still(storage):
                entry = None
                del self._entries[storage._cdata]
            if entry is None:
                found[storage._cdata] = (i, storage)
        return sorted(found.values(), key=lambda item: (-item[1].nbytes(), item[0]))

    def _move(self, leaf: torch.Tensor, may_move: bool) -> Reason | None:
        if not may_move:
            return Reason.NOT_SHARED
        return why_not(leaf) or self._check_budget() or move(leaf.untyped_storage())

    def _check_budget(self) -> Reason | None:
        return Reason.NO_DESCRIPTOR if len(self._entries) >= self._fd_budget else None

    def _enter(self, leaf: int, storage: torch.UntypedStorage, reason: Reason | None) -> None:
        if reason is not None:
            self._refused.setdefault(reason, []).append(leaf)
            return
        entry = _Entry(next(_ids), StorageWeakRef(storage), storage.data_ptr(), storage.nbytes())
        self._entries[storage._cdata] = entry

    def notes(self, names: Callable[[int], str]) -> tuple[str, ...]:
        """What the trainer copies although it is large, and why, as of the last :meth:`share`.

        Args:
            names: the key path of a leaf.
        """
        with self._lock:
            refused = {reason: list(leaves) for reason, leaves in self._refused.items()}
        if self._options.location != "workers":
            refused.pop(Reason.NOT_SHARED, None)  # nobody asked for more
        return tuple(
            f"{len(leaves)} large tensor{'s' * (len(leaves) > 1)} copied by the trainer: {reason.value}, "
            f"e.g. {names(leaves[0])}"
            for reason, leaves in refused.items()
        )

    # -- after planning -----------------------------------------------------------------------------------------

    def split(
        self, copies: Sequence[Copy], leaves: Sequence[Any], *, guarded: bool = True
    ) -> tuple[list[Copy], list[Copy]]:
        """(what the trainer copies, what workers can copy: large, and wholly in one shared source).

        Args:
            guarded: whether training goes on while these are copied; see :meth:`SharingOptions.may_copy`.
        """
        with self._lock:
            self._forget_the_dead()
            if not self._entries or not self._options.may_copy(guarded=guarded):
                return list(copies), []
            for_trainer: list[Copy] = []
            for_workers: list[Copy] = []
            for copy in copies:
                large = copy.nbytes >= _MIN_COPY_BYTES and copy.address >= 0
                mine = for_workers if large and self._holds(copy, leaves[copy.leaf]) else for_trainer
                mine.append(copy)
            return for_trainer, for_workers

    def _holds(self, copy: Copy, leaf: torch.Tensor) -> bool:
        if not _is_on_cpu(leaf):
            return False
        storage = leaf.untyped_storage()
        entry = self._entries.get(storage._cdata)
        return entry is not None and entry.is_still(storage) and entry.contains(copy)

    def live_sources(self) -> frozenset[int]:
        """Ids of the sources that workers may keep mapped: each is, at this moment, alive and where it was.

        While these and the plan are the same, what :meth:`split` said holds: its copies lie in these very mappings.
        """
        with self._lock:
            self._forget_the_dead()
            return self._live()

    def _live(self) -> frozenset[int]:
        return frozenset(entry.source_id for entry in self._entries.values())

    def _forget_the_dead(self) -> None:
        """And those that somebody has moved elsewhere."""
        dead = [key for key, entry in self._entries.items() if entry.storage() is None]
        for key in dead:
            del self._entries[key]
        if dead:
            with suppress(ClosedError, OSError):  # then there is nobody to tell, or the next copy tells them
                for _ in range(self._num_parts):  # equally loaded workers get one each
                    self._pool.hand_over(detach_all_but, self._live())

    def warm_up(self, slabs: Sequence[Slab]) -> None:
        """Have the workers map sources and slabs now, so that the first copy takes no longer than the others.

        Changes nothing, so that the slabs may be in use. A worker that cannot will do it with its first copy.
        """
        sources, live = self._sources()
        if not sources or not self._options.may_copy(guarded=True):
            return
        with suppress(WorkerError, OSError, MemoryError):
            for slab in slabs:
                asked = [self._pool.hand_over(prepare_copy, slab, sources, live) for _ in range(self._num_parts)]
                for future in asked:  # equally loaded workers got one each
                    future.result()

    # -- copying ------------------------------------------------------------------------------------------------

    def copy(
        self,
        copies: Sequence[Copy],
        slab: Slab,
        copy_here: Callable[[list[Copy]], None],
        meanwhile: Sequence[Copy] = (),
    ) -> Copied:
        """Returns when every byte of ``copies`` and ``meanwhile`` is in the slab.

        Args:
            copies: what :meth:`split` gave the workers; the caller keeps the tensors alive and unchanged.
            copy_here: the trainer's own way to copy: for ``meanwhile``, and for what no worker could do.
            meanwhile: what the trainer copies itself, while the workers copy.

        Raises:
            ClosedError: the pool is closed.
            InternalError: a worker was asked for bytes that are not there.
        """
        sources, live = self._sources()
        return self._copier.copy(_locate(copies, sources), slab, live, copy_here, meanwhile)

    def _sources(self) -> tuple[list[SharedSource], frozenset[int]]:
        """What is shared now, from here on held strongly, by address; and the ids of all."""
        with self._lock:
            live = self._live()
            found = [(entry.source_id, entry.storage()) for entry in self._entries.values()]
        sources = [SharedSource.of(source_id, storage) for source_id, storage in found if storage is not None]
        return sorted(sources, key=lambda source: source.address), live


def _locate(copies: Sequence[Copy], sources: list[SharedSource]) -> list[SharedCopy]:
    """Each copy with the source that it lies in."""
    addresses = [source.address for source in sources]
    located = []
    for copy in copies:
        number = bisect_right(addresses, copy.address) - 1
        if number < 0 or copy.address + copy.nbytes > sources[number].address + sources[number].nbytes:
            raise InternalError(f"the source of {copy} moved, or is gone, while its snapshot is taken")
        located.append(SharedCopy(copy, sources[number]))
    return located


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    """With a storage in host memory (sparse, quantized and nested tensors are pickled, not copied)."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
    )


class NoSharing:
    """Stands in for :class:`SourceSharer` where ``staging.location`` is ``trainer``: no worker copies anything."""

    def share(self, leaves: Sequence[Any], may_move: bool) -> bool:
        """Leave every storage where it is: no address changes."""
        return False

    def notes(self, names: Callable[[int], str]) -> tuple[str, ...]:
        """Return no notes: the user chose that the trainer copies everything."""
        return ()

    def split(
        self, copies: Sequence[Copy], leaves: Sequence[Any], *, guarded: bool = True
    ) -> tuple[list[Copy], list[Copy]]:
        """Give every copy to the trainer."""
        return list(copies), []

    def live_sources(self) -> frozenset[int]:
        """Return the empty set: no source is shared."""
        return frozenset()

    def warm_up(self, slabs: Sequence[Slab]) -> None:
        """Do nothing: the workers map no source."""

    def copy(
        self,
        copies: Sequence[Copy],
        slab: Slab,
        copy_here: Callable[[list[Copy]], None],
        meanwhile: Sequence[Copy] = (),
    ) -> Copied:
        """Have the trainer copy everything, ``meanwhile`` first."""
        copy_here([*meanwhile, *copies])
        return Copied()


Sharer = SourceSharer | NoSharing
"""What a saver works with; :func:`make_sharer` chooses."""


def make_sharer(pool: WorkerPool, num_parts: int, options: SharingOptions) -> Sharer:
    """Return the sharer that ``staging.location`` asks for.

    Args:
        pool: its workers copy.
        num_parts: how many workers copy one snapshot at a time, at most.
        options: see :class:`SharingOptions`.
    """
    return NoSharing() if options.location == "trainer" else SourceSharer(pool, num_parts, options)
