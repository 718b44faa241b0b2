"""What one worker does of a staging: the deep copy of its share of a state dict, into the result's slab.

    trainer                                   | shared memory     | worker
    share 0: the state dict  ---------------->| shared sources    |  attach, unpack over the sources
    share 1: a list of storages ------------->|    |              |  deep copy with offload
        places of all storages                |    v              |     each storage -> its place in the slab
    <-- structure of the copy ----------------| slab              |  repack

Every storage has its place in the slab before any worker begins, so that workers need not talk to each other: each copies
the bytes of its share, and the one with the state dict takes the other places as they are. What the trainer has to copy
itself (device memory, what cannot be moved) it copies to its place meanwhile.

A share can be worked on again, by another worker, when the first one died: the same bytes go to the same places, because the
trainer keeps the sources unchanged until the last Future is done.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor their constructors)

from __future__ import annotations

import ctypes
import sys
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stager.workers.faults import point
from stager.workers.memory import attached, shared_source
from stager.workers.memory.attached import Memory
from stager.workers.memory.shared_source import SharedSource, Stretch, check_stretches, copy_stretches
from stager.workers.offload.copier import OffloadCopier
from stager.workers.offload.packed_state import repack, unpack
from stager.workers.offload.parts import SharedValue

_MAX_DEPTH = 10_000  # of nested containers; three calls for each


@dataclass(frozen=True, slots=True)
class Places:
    """Where each storage of a state dict lies in the slab of its copy.

    Attributes:
        offsets: by number, of its first byte.
        sizes: by number, in bytes.
        nbytes: of the slab.
    """

    offsets: array[int]
    sizes: array[int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's share of a staging.

    Attributes:
        structure: what the worker unpacks and copies: the state dict, or a list of storages.
        slab: of the result; in the worker, as mapped there.
        live_slabs: ids of all slabs of results; the others are unmapped.
        sources: that the stretches refer to.
        numbers: of the storages that are these sources.
        stretches: the bytes to copy. A large storage is divided among several shares.
        live_sources: ids of all sources that the trainer still has; the others are unmapped.
    """

    structure: bytes
    places: Places
    slab: Memory
    live_slabs: frozenset[str]
    sources: Sequence[SharedSource]
    numbers: Sequence[int]
    stretches: Sequence[Stretch]
    live_sources: frozenset[int]


def prepare() -> None:
    """Make a worker ready for its first share: this module, and with it torch, is imported."""


def stage_share(share: Share) -> bytes:
    """Deep copy a share into the slab; return the structure of the copy. Runs in a worker.

    Raises:
        InternalError: the share asks for bytes outside of the sources or the slab. Nothing was written then.
    """
    point("stage.begin")
    shared_source.detach_all_but(share.live_sources)
    attached.detach_all_but(share.live_slabs)
    check_stretches(share.slab, share.sources, share.stretches)
    sys.setrecursionlimit(max(_MAX_DEPTH, sys.getrecursionlimit()))
    places = placed_storages(share.places, share.slab)
    storages = list(places)
    for number, source in zip(share.numbers, share.sources, strict=True):
        storages[number] = storage_at(source.address, source.nbytes)
    state = unpack(share.structure, storages, SharedValue)
    point("stage.unpacked")
    copied = OffloadCopier(_ShareStager(share, storages, places)).deepcopy_with_tensor_offload(state)
    point("stage.copied")
    structure = repack(copied, places)
    point("stage.packed")
    return structure


class _ShareStager:
    """A StorageStager: copies what is in the share, and takes the place of every other storage as it is."""

    def __init__(
        self, share: Share, storages: Sequence[torch.UntypedStorage], places: Sequence[torch.UntypedStorage]
    ) -> None:
        self._share = share
        self._stretches: dict[int, list[Stretch]] = defaultdict(list)
        for stretch in share.stretches:
            self._stretches[stretch.source].append(stretch)
        self._sources = {
            storages[number]._cdata: (source, places[number]) for source, number in enumerate(share.numbers)
        }

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        """Copy the share's bytes of a storage to its place; return the place."""
        source, place = self._sources.get(storage._cdata, (-1, storage))
        copy_stretches(self._share.slab, self._share.sources, self._stretches.get(source, ()))
        return place


def placed_storages(places: Places, slab: Memory) -> list[torch.UntypedStorage]:
    """Return the places in a slab, as torch storages of this process."""
    whole = storage_at(slab.address, slab.nbytes)
    return [_placed(whole, offset, nbytes) for offset, nbytes in zip(places.offsets, places.sizes, strict=True)]


def _placed(whole: torch.UntypedStorage, offset: int, nbytes: int) -> torch.UntypedStorage:
    placed: torch.UntypedStorage = whole[offset : offset + nbytes] if nbytes else torch.UntypedStorage(0, device="cpu")
    return placed


def storage_at(address: int, nbytes: int) -> torch.UntypedStorage:
    """Return memory as a torch storage. The caller keeps it mapped."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8).untyped_storage()
