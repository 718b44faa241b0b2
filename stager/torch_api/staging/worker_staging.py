"""One staging by workers: from a packed state to a state dict over the result's slab.

caller's thread      pack       the structure as bytes, the storages as a list
                     share      large CPU storages are moved into shared memory, once (stager/sharing)
                     place      each storage gets its place in a leased slab
                     submit     shares of equal bytes, one with the structure ------------> workers: deep copy
staging thread       copy       what no worker can read: small storages, device memory          |
                     wait       <-----------------------------------------------------------------'
                     unpack     the structure of the copy, over the places in the slab
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor their constructors)

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from stager.sharing.sharer import SourceSharer
from stager.sharing.worker_copy import CopyTask, divide
from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier, wait_uninterrupted
from stager.state.placement import LARGE_BYTES, Copy
from stager.workers.device.streams import SideStreams
from stager.workers.memory.host_buffers import slice_shared
from stager.workers.memory.slab import Slab
from stager.workers.offload.packed_state import PackedState, list_of_storages, unpack
from stager.workers.pool.pool import WorkerPool
from stager.workers.staged_copy.persisting import StagedCopy
from stager.workers.staged_copy.share import Places, Share, stage_share

_ALIGN_BYTES = 64  # what torch's own CPU allocator gives
_PAGE_BYTES = 4096


@dataclass(slots=True)
class WorkerStaging:
    """A staging that has begun. It holds the source's storages, and leases the slab, until it is finished.

    Attributes:
        copies: what the trainer copies itself.
        sources: by number, a tensor of bytes over each storage; what is small and in host memory needs none.
        streams: behind the trainer's work on the devices.
        is_warm: whether the slab's pages are allocated.
        shares: one Future for each share that a worker has; the first is that of the state dict.
    """

    packed: PackedState
    places: Places
    slab: Slab
    is_warm: bool
    copies: Sequence[Copy]
    sources: Sequence[torch.Tensor]
    streams: SideStreams
    shares: list[Future[bytes]] = field(default_factory=list)

    def submit(self, tasks: Sequence[CopyTask], live_sources: frozenset[int], pool: WorkerPool) -> None:
        """Give each task to a worker: the first with the state dict, the others with lists of storages.

        Raises:
            ClosedError: the pool is closed.
            OSError: no descriptor is left.
        """
        try:
            for task in tasks:
                numbers = {stretch.source: copy.leaf for stretch, copy in zip(task.stretches, task.copies, strict=True)}
                structure = list_of_storages(list(numbers.values())) if self.shares else self.packed.structure
                share = Share(
                    structure,
                    self.places,
                    self.slab,
                    list(task.sources.values()),
                    [numbers[source] for source in range(len(numbers))],
                    task.stretches,
                    live_sources,
                )
                future: Future[bytes] = Future()
                self.shares.append(future)  # before it is sent: Ctrl-C must not leave a task without a Future
                pool.submit_to(future, stage_share, share)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Cancel the shares that no worker has begun, and wait for the others: they write into the slab."""
        wait_uninterrupted([share for share in self.shares if not share.cancel() and share.running()])

    def finish(self, copier: Copier) -> tuple[Any, StagedCopy]:
        """Return the staged state dict, and what a worker needs to read it. Runs in the staging thread.

        Raises:
            WorkerDiedError: workers died while they copied, as often as is allowed.
        """
        try:
            batches = batch(self.copies)
            copier.copy(batches, self.sources, self.slab, self.streams, cold=not self.is_warm)
        finally:
            wait_uninterrupted(self.shares)
        structure, *_ = [share.result() for share in self.shares]
        state = unpack(structure, _results(self.places, self.slab), self.packed.shared.__getitem__)
        return state, StagedCopy(structure, self.places, self.slab, self.packed.shared)


def place(storages: Sequence[torch.UntypedStorage]) -> Places:
    """Give each storage a place in a slab, in their order; large ones begin with a page."""
    offsets, sizes = array("q"), array("q")
    position = 0
    for storage in storages:
        nbytes = storage.nbytes()
        sizes.append(nbytes)
        unit = _PAGE_BYTES if nbytes >= LARGE_BYTES else _ALIGN_BYTES
        position = -(-position // unit) * unit
        offsets.append(position)
        position += nbytes
    return Places(offsets, sizes, position)


def copies_to(places: Places, storages: Sequence[torch.UntypedStorage]) -> list[Copy]:
    """Return the copies that fill the places, in slab order. ``Copy.leaf`` is a storage's number."""
    return [
        Copy(number, storage.data_ptr(), offset, nbytes, (number,), storage.device.type == "cpu")
        for number, (storage, offset, nbytes) in enumerate(zip(storages, places.offsets, places.sizes, strict=True))
        if nbytes
    ]


def source_tensors(storages: Sequence[torch.UntypedStorage], min_bytes: int) -> list[torch.Tensor]:
    """Return a tensor of bytes over each storage on a device, and over each of ``min_bytes`` or more."""
    nothing = torch.empty(0, dtype=torch.uint8)
    return [
        _bytes_of(storage) if storage.device.type != "cpu" or storage.nbytes() >= min_bytes else nothing
        for storage in storages
    ]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload,no-any-return]  # torch's stubs lack it


def _results(places: Places, slab: Slab) -> list[torch.UntypedStorage]:
    """Return the places as shared storages, each of which keeps the slab leased."""
    return [_result(slab, offset, nbytes) for offset, nbytes in zip(places.offsets, places.sizes, strict=True)]


def _result(slab: Slab, offset: int, nbytes: int) -> torch.UntypedStorage:
    return slice_shared(slab.storage, offset, nbytes) if nbytes else torch.UntypedStorage(0, device="cpu")


def assign(
    copies: Sequence[Copy], sources: Sequence[torch.Tensor], sharer: SourceSharer, num_workers: int
) -> tuple[list[Copy], list[CopyTask], frozenset[int]]:
    """Divide the copies among the trainer and the workers; there is one task at least, for the state dict itself.

    Returns:
        What the trainer copies, the workers' tasks, and the ids of all live sources.
    """
    mine, theirs = sharer.split(copies, sources, guarded=False)
    located, live = sharer.locate(theirs)
    return mine, divide(located, num_workers) if located else [CopyTask()], live
