"""One staging by workers: from a packed state to a state dict over the result's slab.

    caller's thread      prepare    large CPU storages are moved into shared memory, once (stager/sharing)
                                    each storage gets its place in the slab
    staging thread       submit     shares of equal bytes, one with the state dict ---------> workers: deep copy
                         copy       what no worker can read: small storages, device memory       |
                         wait       <------------------------------------------------------------'
                         unpack     the structure of the copy, over the places in the slab

No signal handler runs in the staging thread. So Ctrl-C leaves no worker that writes into a slab which nobody holds.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor their constructors)

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from stager.saving.staging_thread import wait_uninterrupted
from stager.sharing.sharer import SourceSharer
from stager.sharing.worker_copy import CopyTask, divide
from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier
from stager.state.copies import Copy
from stager.state.placement import LARGE_BYTES
from stager.workers.device.streams import SideStreams
from stager.workers.memory.host_buffers import slice_shared
from stager.workers.memory.slab import Slab
from stager.workers.offload.packed_state import PackedState, list_of_storages, unpack
from stager.workers.pool.pool import WorkerPool
from stager.workers.staged_copy.persisting import StagedCopy
from stager.workers.staged_copy.share import Places, Share, stage_share

_ALIGN_BYTES = 64  # what torch's own CPU allocator gives
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class WorkerStaging:
    """A staging that is prepared. It holds the source's storages, and leases the slab.

    Attributes:
        tasks: what workers copy. There is one at least, for the state dict itself.
        numbers: by leaf of the tasks' copies, the number of the storage.
        live_sources: ids of all sources.
        slab: of the result.
        is_warm: whether the slab's pages are allocated.
        live_slabs: ids of all slabs of results.
        streams: behind the trainer's work on the devices.
    """

    packed: PackedState
    places: Places
    tasks: Sequence[CopyTask]
    numbers: Sequence[int]
    live_sources: frozenset[int]
    slab: Slab
    is_warm: bool
    live_slabs: frozenset[str]
    streams: SideStreams

    def run(self, pool: WorkerPool, copier: Copier) -> tuple[Any, StagedCopy]:
        """Return the staged state dict, and what a worker needs to read it. Runs in the staging thread.

        Raises:
            WorkerDiedError: workers died while they copied, and the allowed number of restarts is used up.
            ClosedError: the pool is closed.
            OSError: no descriptor is left.
        """
        shares: list[Future[bytes]] = []
        try:
            for share in self._shares():  # the one with the state dict comes first
                shares.append(pool.submit(stage_share, share))
            self._copy_the_rest(copier)
            storages = _shared_places(self.places, self.slab)  # while the workers are busy
        finally:
            wait_uninterrupted(shares)  # also after an error: they write into the slab
        structure, *_ = [share.result() for share in shares]
        state = unpack(structure, storages, self.packed.shared.__getitem__)
        return state, StagedCopy(structure, self.places, self.slab, self.packed.shared)

    def _shares(self) -> Iterable[Share]:
        structure = self.packed.structure
        for task in self.tasks:
            number_of = {
                one.source: self.numbers[copy.leaf] for one, copy in zip(task.stretches, task.copies, strict=True)
            }
            numbers = [number_of[source] for source in range(len(task.sources))]
            yield Share(
                structure=structure or list_of_storages(numbers),
                places=self.places,
                slab=self.slab,
                live_slabs=self.live_slabs,
                sources=list(task.sources.values()),
                numbers=numbers,
                stretches=task.stretches,
                live_sources=self.live_sources,
            )
            structure = b""

    def _copy_the_rest(self, copier: Copier) -> None:
        by_workers = {self.numbers[copy.leaf] for task in self.tasks for copy in task.copies}
        storages = self.packed.storages
        copies = [
            Copy(number, storage.data_ptr(), offset, nbytes, (number,), storage.device.type == "cpu")
            for number, (storage, offset, nbytes) in enumerate(
                zip(storages, self.places.offsets, self.places.sizes, strict=True)
            )
            if nbytes and number not in by_workers
        ]
        nothing = torch.empty(0, dtype=torch.uint8)  # of memory on the host only the address is needed
        tensors = [nothing if storage.device.type == "cpu" else bytes_over(storage) for storage in storages]
        copier.copy(batch(copies), tensors, self.slab, self.streams, cold=not self.is_warm)


def share_sources(
    storages: Sequence[torch.UntypedStorage], places: Places, sharer: SourceSharer, min_bytes: int, num_workers: int
) -> tuple[list[CopyTask], list[int], frozenset[int]]:
    """Move large CPU storages into shared memory, and divide the copies of those that are there among the workers.

    Args:
        min_bytes: smaller storages are left to the trainer.

    Returns:
        The workers' tasks, the numbers of the storages by the leaves of their copies, and the ids of all sources.
    """
    numbers = [n for n, storage in enumerate(storages) if places.sizes[n] >= min_bytes and storage.device.type == "cpu"]
    leaves = [bytes_over(storages[number]) for number in numbers]
    sharer.share(leaves, may_move=True)
    copies = [
        Copy(leaf, tensor.data_ptr(), places.offsets[numbers[leaf]], tensor.nbytes, (leaf,))
        for leaf, tensor in enumerate(leaves)
    ]
    _, shared = sharer.split(copies, leaves, guarded=False)
    located, live = sharer.locate(shared)
    return divide(located, num_workers) if located else [CopyTask()], numbers, live


def place(storages: Sequence[torch.UntypedStorage]) -> Places:
    """Give each storage a place in a slab, in their order; large ones begin with a page."""
    offsets, sizes = array("q"), array("q")
    position = 0
    for storage in storages:
        nbytes = storage.nbytes()
        unit = _PAGE_BYTES if nbytes >= LARGE_BYTES else _ALIGN_BYTES
        position = -(-position // unit) * unit
        offsets.append(position)
        sizes.append(nbytes)
        position += nbytes
    return Places(offsets, sizes, position)


def bytes_over(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the bytes of a storage, as a tensor over it."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload,no-any-return]  # torch's stubs lack it


def _shared_places(places: Places, slab: Slab) -> list[torch.UntypedStorage]:
    """Return the places as shared storages, each of which keeps the slab leased."""
    memory = slab.storage
    return [
        slice_shared(memory, offset, nbytes) if nbytes else torch.UntypedStorage(0, device="cpu")
        for offset, nbytes in zip(places.offsets, places.sizes, strict=True)
    ]
