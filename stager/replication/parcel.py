"""A state dict as a few large messages: a header and slabs, however many tensors it has.

NOTE [ What is sent ]
The sender's copy of the state is staged into *slabs*: small storages one after the other in a slab, a large one alone in
its own. The *header* is the pickled structure, in which each storage is a range of a slab, and the sizes of the slabs.
The receiver allocates slabs of those sizes, receives straight into them, and unpickles the structure over them: views,
strides, offsets, tied tensors, conj bits and parameters come out as they went in. The header is a pickle: it is trusted
like everything else the ranks of one job send each other.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor their constructors)

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from stager.workers.errors import UnstageableError
from stager.workers.offload.copier import OffloadCopier

OWN_SLAB_BYTES = 8 << 20
_MIN_SLAB_BYTES = 1 << 20
_MAX_SLAB_BYTES = 64 << 20
_ALIGN_BYTES = 64
_EMPTY = -1  # the slab of storages that have no bytes
Place = tuple[int, int, int]  # slab, start, bytes


@dataclass(frozen=True)
class Parcel:
    """A header, and the used bytes of the slabs it refers to (uint8 CPU tensors)."""

    header: bytes
    slabs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ParcelHeader:
    """What travels first, pickled: sizes of the slabs, and the pickled state dict, whose storages are ranges of them."""

    slab_bytes: tuple[int, ...]
    structure: bytes


def pack(state_dict: Any) -> Parcel:
    """Copy a state dict into slabs. Raises UnstageableError for what cannot be copied or pickled."""
    packer = _SlabPacker()
    staged = OffloadCopier(packer).deepcopy_with_tensor_offload(state_dict)
    file = io.BytesIO()
    try:
        _StructurePickler(file, packer).dump(staged)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnstageableError("state_dict", f"holds an object that cannot be sent: {error}") from error
    slabs = tuple(as_bytes(slab)[:used] for slab, used in zip(packer.slabs, packer.used, strict=True))
    header = ParcelHeader(tuple(slab.nbytes for slab in slabs), file.getvalue())
    return Parcel(pickle.dumps(header), slabs)


def open_header(data: bytes) -> ParcelHeader:
    """Unpickle a header. Raises UnpicklingError for anything else."""
    header = pickle.loads(data)
    if not isinstance(header, ParcelHeader):
        raise pickle.UnpicklingError(f"expected a parcel's header, got a {type(header).__name__}")
    return header


def unpack(header: ParcelHeader, slabs: list[torch.UntypedStorage]) -> Any:
    """The state dict over received slabs, which it keeps alive."""
    return _StructureUnpickler(io.BytesIO(header.structure), slabs).load()


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a one-dimensional uint8 tensor over the same memory."""
    y: torch.Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return y


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


class _SlabPacker:
    """A StorageStager (``workers/offload``) that packs storages into slabs."""

    def __init__(self) -> None:
        self.slabs: list[torch.UntypedStorage] = []
        self.used: list[int] = []  # bytes of each slab
        self._places: dict[int, Place] = {}  # by identity of the storage
        self._kept: list[torch.UntypedStorage] = []  # so that those identities stay theirs
        self._open: int | None = None  # index of the slab being filled

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        nbytes = storage.nbytes()
        if nbytes == 0:  # in no slab: it would lie where its neighbour begins, and seem to alias it
            return self._keep(torch.UntypedStorage(0, device="cpu"), (_EMPTY, len(self._kept), 0))
        slab, start = self._reserve(nbytes)
        staged: torch.UntypedStorage = self.slabs[slab][start : start + nbytes]
        staged.copy_(storage, non_blocking)
        return self._keep(staged, (slab, start, nbytes))

    def place_of(self, storage: torch.UntypedStorage) -> Place:
        """Where a storage lies. One that came with an object that is shared, not copied, is packed now."""
        if id(storage) not in self._places:
            self._keep(storage, self._places[id(self.stage(storage, False))])
        return self._places[id(storage)]

    def _keep(self, staged: torch.UntypedStorage, place: Place) -> torch.UntypedStorage:
        self._places[id(staged)] = place
        self._kept.append(staged)
        return staged

    def _reserve(self, nbytes: int) -> tuple[int, int]:
        if nbytes >= OWN_SLAB_BYTES:
            return self._append(nbytes, used=nbytes), 0
        if self._open is None or _aligned(self.used[self._open]) + nbytes > self.slabs[self._open].nbytes():
            size = _MIN_SLAB_BYTES if self._open is None else self.slabs[self._open].nbytes() * 4
            self._open = self._append(max(nbytes, min(size, _MAX_SLAB_BYTES)), used=0)
        start = _aligned(self.used[self._open])
        self.used[self._open] = start + nbytes
        return self._open, start

    def _append(self, nbytes: int, used: int) -> int:
        self.slabs.append(torch.UntypedStorage(nbytes, device="cpu"))
        self.used.append(used)
        return len(self.slabs) - 1


class _StructurePickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, packer: _SlabPacker) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._packer = packer

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return (self._packer.place_of(obj._untyped_storage), obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            return (self._packer.place_of(obj), None)
        return None


class _StructureUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, slabs: list[torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._slabs = slabs
        self._storages: dict[Place, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> Any:
        place, dtype = pid
        if place not in self._storages:
            slab, start, nbytes = place
            empty = torch.UntypedStorage(0, device="cpu")
            self._storages[place] = self._slabs[slab][start : start + nbytes] if nbytes else empty
        storage = self._storages[place]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
