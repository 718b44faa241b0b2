"""``staging.location``: which sources lie in shared memory, and their copy into the slab by the workers.

    share()   before planning: note the large CPU storages in shared memory, or move them there (``movable.py``)
    split()   which copies of a plan the workers can do
    copy()    divide them by bytes -> idle workers copy -> all done, or the trainer does the rest

With ``location: trainer`` nothing is ever shared: each step leaves all copies to the trainer.

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

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stager.sharing.movable import Reason, move, sendable, why_not
from stager.sharing.worker_copy import Copied, SharedCopy, WorkerCopier
from stager.state.copies import Copies, Copy
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.errors import ClosedError, InternalError
from stager.workers.memory.host_buffers import default_fd_budget
from stager.workers.memory.shared_source import SharedSource, detach_all_but
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import WorkerPool

Location = Literal["auto", "trainer", "workers"]

_MIN_COPY_BYTES = 64 << 10  # below, telling a worker costs as much as copying
_MIN_ELEMENTS = _MIN_COPY_BYTES // 16  # of the largest dtype: cheap to ask of 20,000 tensors

_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """What to share. ``location`` is ``staging.location``; storages smaller than ``min_bytes`` are left alone.

    ``fd_budget``: storages that are shared at a time, each with a descriptor; None: an eighth of ``ulimit -n``.
    """

    location: Location = "auto"
    min_bytes: int = 1 << 20
    fd_budget: int | None = None

    def may_copy(self, *, guarded: bool) -> bool:
        """Whether workers copy what lies in shared memory.

        With ``auto`` they copy large CPU tensors that are in shared memory anyway (``model.share_memory()``), and only if
        these are guarded, so that training goes on meanwhile. When ``save()`` waits for the copy, the trainer's own threads
        are faster: they are not niced. The trainer always copies CUDA tensors and small ones.
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
    """Knows the sources that workers can read, and has at most ``num_parts`` workers copy one snapshot at a time."""

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
        """Find the large CPU storages of ``leaves`` that are in shared memory, or move them there; the largest first.

        Args:
            leaves: of the state, in order; what is no tensor is passed over.
            may_move: no snapshot is being taken; see NOTE [ What a move changes ]. Nothing is moved unless the user asked
                for it with ``location: workers``.

        Returns:
            Whether something was moved: its address is another now, so the snapshot has to be planned again.
        """
        if self._options.location == "trainer":
            return False
        has_moved = False
        may_move = may_move and self._options.location == "workers"
        with self._lock:
            self._forget_the_dead()
            self._refused = {}
            found = self._find(leaves)
            # Those that are shared already come first: they need no room, and the budget of descriptors may end.
            shared = [(leaf, storage) for leaf, storage in found if storage.is_shared()]
            reasons = sendable([storage for _, storage in shared]) if shared else []
            for (leaf, storage), reason in zip(shared, reasons, strict=True):
                self._enter(leaf, storage, reason or self._check_budget())
            for leaf, storage in found:
                if not storage.is_shared():
                    reason = self._move(leaves[leaf], may_move)
                    has_moved = has_moved or reason is None
                    self._enter(leaf, storage, reason)
        return has_moved

    def _find(self, leaves: Sequence[Any]) -> list[tuple[int, torch.UntypedStorage]]:
        """(leaf, storage) of every large CPU storage that is not known, once each, largest first."""
        found: dict[int, tuple[int, torch.UntypedStorage]] = {}
        large = [
            i
            for i, leaf in enumerate(leaves)
            if (leaf.numel() >= _MIN_ELEMENTS if type(leaf) in PLAIN_TENSORS else _is_large(leaf))
        ]
        for i in large:
            leaf = leaves[i]
            if not _is_on_cpu(leaf):
                continue
            storage = leaf.untyped_storage()
            if storage.nbytes() < self._options.min_bytes or storage._cdata in found:
                continue
            entry = self._entries.get(storage._cdata)
            if entry is None or not entry.is_still(storage):
                self._entries.pop(storage._cdata, None)
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
        self._entries[storage._cdata] = _Entry(
            next(_ids), StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        )

    def notes(self, names: Callable[[int], str]) -> tuple[str, ...]:
        """What the trainer copies although it is large, and why, as of the last :meth:`share`. ``names`` gives key paths."""
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
    ) -> tuple[Copies, list[Copy]]:
        """Divide ``copies`` into those of the trainer, and those of the workers: large, and wholly in one shared source.

        Args:
            guarded: whether training goes on while these are copied; see :meth:`SharingOptions.may_copy`.
        """
        with self._lock:
            self._forget_the_dead()
            copies = Copies.of(copies)
            if not self._entries or not self._options.may_copy(guarded=guarded):
                return copies, []
            by_workers = (copies.nbytes >= _MIN_COPY_BYTES) & ~copies.is_packed
            for position in np.flatnonzero(by_workers).tolist():
                copy = copies[position]
                by_workers[position] = self._holds(copy, leaves[copy.leaf])
            return copies.where(~by_workers), list(copies.where(by_workers))

    def _holds(self, copy: Copy, leaf: torch.Tensor) -> bool:
        if not _is_on_cpu(leaf):
            return False
        storage = leaf.untyped_storage()
        entry = self._entries.get(storage._cdata)
        return entry is not None and entry.is_still(storage) and entry.contains(copy)

    def live_sources(self) -> frozenset[int]:
        """Ids of the sources that workers may keep mapped: each is, at this moment, alive and where it was.

        While these ids and the plan stay the same, :meth:`split` gives the same answer.
        """
        with self._lock:
            self._forget_the_dead()
            return self._live()

    def _live(self) -> frozenset[int]:
        return frozenset(entry.source_id for entry in self._entries.values())

    def _forget_the_dead(self) -> None:
        """Drop the entries whose storage is gone, or was moved elsewhere, and have the workers unmap them."""
        dead = [key for key, entry in self._entries.items() if entry.storage() is None]
        for key in dead:
            del self._entries[key]
        if dead:
            with suppress(ClosedError, OSError):  # no worker is left to tell, or the next copy tells them
                # Once for each worker: hand_over() picks the worker with the fewest tasks, so that each gets one.
                for _ in range(self._num_parts):
                    self._pool.hand_over(detach_all_but, self._live())

    # -- copying ------------------------------------------------------------------------------------------------

    def copy(
        self,
        copies: Sequence[Copy],
        slab: Slab,
        copy_here: Callable[[list[Copy]], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Copied:
        """Return when every byte of ``copies`` is in the slab, and ``meanwhile`` has returned.

        Args:
            copies: what :meth:`split` gave the workers; the caller keeps the tensors alive and unchanged.
            copy_here: the trainer's own way to copy, for what no worker could do.
            meanwhile: called while the workers copy: the trainer does its own part.

        Raises:
            ClosedError: the pool is closed.
            InternalError: a worker was asked for bytes that are not there.
        """
        located, live = self.locate(copies)
        return self._copier.copy(located, slab, live, copy_here, meanwhile)

    def locate(self, copies: Sequence[Copy]) -> tuple[list[SharedCopy], frozenset[int]]:
        """Pair copies that :meth:`split` gave the workers with their sources; also return the ids of all live sources.

        Raises:
            InternalError: a source is not where it was.
        """
        sources, live = self._sources()
        return _locate(copies, sources), live

    def _sources(self) -> tuple[list[SharedSource], frozenset[int]]:
        """Return the shared sources, sorted by address and held strongly from here on, and the ids of all."""
        with self._lock:
            live = self._live()
            found = [(entry.source_id, entry.storage()) for entry in self._entries.values()]
        sources = [SharedSource.of(source_id, storage) for source_id, storage in found if storage is not None]
        return sorted(sources, key=lambda source: source.address), live


def _locate(copies: Sequence[Copy], sources: list[SharedSource]) -> list[SharedCopy]:
    """Pair each copy with the source that it lies in. ``sources`` are sorted by address."""
    addresses = [source.address for source in sources]
    located = []
    for copy in copies:
        number = bisect_right(addresses, copy.address) - 1
        if number < 0 or copy.address + copy.nbytes > sources[number].address + sources[number].nbytes:
            raise InternalError(f"the memory of a tensor moved, or was freed, while workers copied it ({copy})")
        located.append(SharedCopy(copy, sources[number]))
    return located


def _is_large(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not torch.nn.parameter.is_lazy(leaf) and leaf.numel() >= _MIN_ELEMENTS


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether its storage in host memory can be copied (sparse, quantized and nested tensors are pickled instead)."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
    )
