"""Where staged bytes live: CPU storages that are private or shared, pageable or pinned.

NOTE [ Regions and slabs ]
A *region* is one page-aligned piece of memory: one mapping (one file descriptor) if shared, one registration if
pinned. A storage of ``OWN_REGION_BYTES`` or more gets a region of its own, which is freed with it. Smaller ones share a
*slab*: a region that is filled from the front, and freed when the last storage in it goes. When ``fd_budget`` regions are
alive, large storages share slabs too, and slabs grow with what was allocated before (up to 1 GiB). So the number of file
descriptors grows with the logarithm of the bytes, and never with the number of tensors.
Private pageable storages need none of this and are torch's own.

The cost: one storage that is kept alive keeps its whole slab alive, and the unused end of a slab is wasted: address space,
and memory only once touched. Shared regions are anonymous (memfd): no name in ``/dev/shm``, no ``/dev/shm`` size limit, and
nothing is left behind by a SIGKILL.

NOTE [ Slices ]
torch takes only storages that own a whole mapping as shared, with one file descriptor each; 20,000 shared tensors fail
with "too many open files". A :class:`SharedSlice` is a range of one mapping that many storages live in. Its ``is_shared()``
is true. torch.multiprocessing sends it as the mapping (one descriptor, however many slices travel in the message) and a
range; in the receiver it is a slice of the same memory. Plain ``pickle`` and ``torch.save`` take only its own bytes.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

import mmap
import resource
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy
from torch.multiprocessing.reductions import reduce_storage

from stager.workers.device.host_memory import can_register, new_pinned, pin
from stager.workers.memory.slab import new_shared_memory

OWN_REGION_BYTES = 1 << 20
_MIN_SLAB_BYTES = 4 << 20
_MAX_SLAB_BYTES = 1 << 30
_ALIGN_BYTES = 64  # what torch's own CPU allocator gives
_UNLIMITED_FDS = 1 << 16


class HostBuffers:
    """Allocates CPU storages. Not thread-safe.

    Args:
        shared: storages are in shared memory: ``is_shared()``, sent by torch.multiprocessing without a copy.
        pinned: storages are page-locked; needs an accelerator. Falls back to pageable memory with one warning.
        pin_min_bytes: storages smaller than this many bytes are not pinned.
        fd_budget: regions alive before large storages share slabs too; default an eighth of ``ulimit -n``.
    """

    def __init__(
        self, *, shared: bool = False, pinned: bool = False, pin_min_bytes: int = 5, fd_budget: int | None = None
    ) -> None:
        self.shared = shared
        self.pinned = pinned
        self.pin_min_bytes = pin_min_bytes
        self._fd_budget = default_fd_budget() if fd_budget is None else fd_budget
        self._regions: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._slab: torch.UntypedStorage | None = None
        self._slab_start = 0
        self._slab_used = 0
        self._total_bytes = 0

    def new(self, nbytes: int) -> torch.UntypedStorage:
        """Return an uninitialised storage of ``nbytes`` bytes. Raises OSError: no memory, or no descriptor, is left."""
        pinned = self.pinned_of(nbytes) > 0
        if nbytes == 0 or not (self.shared or pinned):
            return torch.UntypedStorage(nbytes, device="cpu")
        self._total_bytes += nbytes
        if nbytes >= OWN_REGION_BYTES and len(self._regions) < self._fd_budget:
            region, start = self._new_region(nbytes)
            self._regions.add(region)
            return region if start == 0 and region.nbytes() == nbytes else self._slice(region, start, nbytes)
        return self._carve(nbytes)

    def pinned_of(self, nbytes: int) -> int:
        """Return how many bytes of a storage of this size are page-locked: all, or none."""
        return nbytes if self.pinned and nbytes >= self.pin_min_bytes else 0

    def drop(self) -> None:
        """Forget the slab being filled: the next storage starts a new one. Storages given out keep theirs."""
        self._slab = None
        self._total_bytes = 0

    def _carve(self, nbytes: int) -> torch.UntypedStorage:
        if self._slab is None or self._slab_used + nbytes > self._slab.nbytes() - self._slab_start:
            size = max(nbytes, min(max(self._total_bytes // 2, _MIN_SLAB_BYTES), _MAX_SLAB_BYTES))
            self._slab, self._slab_start = self._new_region(_round_up(size, mmap.PAGESIZE))
            self._slab_used = 0
            self._regions.add(self._slab)
        start = self._slab_start + self._slab_used
        self._slab_used += _round_up(nbytes, _ALIGN_BYTES)
        return self._slice(self._slab, start, nbytes)

    def _slice(self, region: torch.UntypedStorage, start: int, nbytes: int) -> torch.UntypedStorage:
        return slice_shared(region, start, nbytes) if self.shared else region[start : start + nbytes]

    def _new_region(self, nbytes: int) -> tuple[torch.UntypedStorage, int]:
        """Return a storage, and the offset in it at which ``nbytes`` page-aligned bytes begin."""
        if self.shared:
            region, start = _new_shared_mapping(nbytes), 0
        elif self.pinned and not can_register():
            return new_pinned(nbytes).untyped_storage(), 0
        else:  # whole pages, so that no other registration overlaps this one
            region = torch.UntypedStorage(_round_up(nbytes, mmap.PAGESIZE) + mmap.PAGESIZE, device="cpu")
            start = -region.data_ptr() % mmap.PAGESIZE
        if self.pinned:
            self.pinned = pin(region, region.data_ptr() + start, _round_up(nbytes, mmap.PAGESIZE))
        return region, start


def _new_shared_mapping(nbytes: int) -> torch.UntypedStorage:
    if get_sharing_strategy() == "file_system":  # the user's choice; torch then sends only named memory without a copy
        named: torch.UntypedStorage = torch.UntypedStorage._new_shared(nbytes)
        return named
    return new_shared_memory("stager", nbytes)


def default_fd_budget() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (_UNLIMITED_FDS if soft == resource.RLIM_INFINITY else soft) // 8)


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


class SharedSlice(torch.UntypedStorage):
    """See NOTE [ Slices ]. Only :func:`slice_shared` makes one. ``mapping`` owns the memory."""

    mapping: torch.UntypedStorage | None = None
    offset: int = 0

    def is_shared(self) -> bool:
        return self.mapping is not None or super().is_shared()

    def share_memory_(self) -> SharedSlice:
        if self.mapping is None:
            super().share_memory_()
        return self

    def clone(self) -> torch.UntypedStorage:
        """Return a private copy, as ``copy.deepcopy`` and ``torch.clone`` expect."""
        copied: torch.UntypedStorage = torch.UntypedStorage(self.nbytes(), device="cpu").copy_(self, False)
        return copied


def slice_shared(mapping: torch.UntypedStorage, offset: int, nbytes: int) -> SharedSlice:
    """Return ``mapping[offset : offset + nbytes]`` as a shared storage (bytes)."""
    storage: Any = mapping[offset : offset + nbytes]
    # Slicing returns torch's own class, which has the same memory layout. The object keeps its new class and attributes
    # while any tensor uses the storage, because torch preserves a storage's Python object.
    storage.__class__ = SharedSlice
    storage.mapping = mapping
    storage.offset = offset
    sliced: SharedSlice = storage
    return sliced


def _reduce(storage: SharedSlice) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if storage.mapping is None:
        return reduce_storage(storage)  # type: ignore[no-any-return]  # a storage of its own: torch's way
    return slice_shared, (storage.mapping, storage.offset, storage.nbytes())


ForkingPickler.register(SharedSlice, _reduce)
