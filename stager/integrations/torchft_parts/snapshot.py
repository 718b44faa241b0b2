"""A snapshot as it travels: a header, and the slabs that it refers to.

NOTE [ What a snapshot is made of ]
    staged state     a deep copy with offload: its storages lie in leased shared memory (:class:`Stager`)
    slabs            the stretches of that memory which hold the storages: nothing is copied a second time
    structure        the pickled state, in which each storage is a number, as in files of ``torch.save``
    places           where in the slabs each storage lies
    header           JSON of step, places, lengths and hashes of the slabs; then the structure
The header travels first, signed with the key of the connection. The receiver allocates slabs of these lengths, compares
the hashes, and unpickles the structure over them.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor their constructors)

from __future__ import annotations

import ctypes
import io
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash

from stager.replication.parcel import Parcel, as_bytes
from stager.workers.device import accelerator
from stager.workers.device.accelerator import devices_in_use
from stager.workers.device.streams import SideStreams
from stager.workers.errors import ReplicationError, UnstageableError
from stager.workers.memory.buffer_pool import BufferPool
from stager.workers.memory.host_buffers import HostBuffers, SharedSlice
from stager.workers.memory.pages import bytes_at
from stager.workers.offload.copier import OffloadCopier
from stager.workers.offload.hook_memo import HookMemo

Place = tuple[int, int, int]
"""Where a storage lies: the slab, and in it the first byte and the number of bytes."""

_GAP_BYTES = 64  # storages that lie closer together travel in one slab
_EMPTY = -1
_PROTOCOL = 2  # what torch's weights_only unpickler reads
_LENGTH_BYTES = 8


class SnapshotMemory(BufferPool):
    """Leased shared memory, page-locked where there is an accelerator."""

    def __init__(self) -> None:
        super().__init__(HostBuffers(shared=True, pinned=accelerator.current() is not None))

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        """Copy a storage; return the copy. From a device, it may still run: the caller synchronises."""
        leased = self.take(storage.nbytes())
        if (
            storage.device.type == "cpu"
        ):  # Storage.copy_() waits for threads of OpenMP: 1 s in place of 0.2 on a busy host
            ctypes.memmove(leased.data_ptr(), storage.data_ptr(), storage.nbytes())
        else:
            leased.copy_(storage, non_blocking)
        return leased


class Stager:
    """Deep copies in host memory, which is used again when nothing refers to a copy any more. Not thread-safe.

    Attributes:
        memory: of the copies.
    """

    def __init__(self) -> None:
        self.memory = SnapshotMemory()
        self._copier = OffloadCopier(self.memory)

    def stage(self, state: Any) -> Any:
        """Return a copy. When this returns, the state may be changed.

        Raises:
            UnstageableError: something in it cannot be copied.
        """
        streams, memo = SideStreams(devices_in_use()), HookMemo()  # the memo keeps the sources until they are copied
        self.memory.begin_pass()
        with streams.stream():
            staged = self._copier.deepcopy_with_tensor_offload(state, memo, non_blocking=True)
        streams.synchronize()
        return staged


@dataclass(frozen=True)
class Header:
    """What a receiver has to know before the slabs arrive.

    Attributes:
        step: of the snapshot.
        slab_bytes: length of each slab.
        digests: xxh3_128 of each slab, hex.
        places: of each storage, in the order of their numbers.
        structure: pickle.
    """

    step: int
    slab_bytes: list[int]
    digests: list[str]
    places: list[Place]
    structure: bytes

    def to_bytes(self) -> bytes:
        """Serialise it."""
        facts = json.dumps([self.step, self.slab_bytes, self.digests, self.places]).encode()
        return len(facts).to_bytes(_LENGTH_BYTES, "little") + facts + self.structure

    @staticmethod
    def from_bytes(data: bytes) -> Header:
        """Parse what :meth:`to_bytes` wrote. The bytes are signed, so they are what the sender wrote."""
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        step, slab_bytes, digests, places = json.loads(data[_LENGTH_BYTES:end])
        return Header(step, slab_bytes, digests, [(slab, start, nbytes) for slab, start, nbytes in places], data[end:])


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in leased memory, which is given back when nothing refers to it any more."""

    step: int
    places: list[Place]
    slabs: tuple[torch.Tensor, ...]
    structure: bytes

    @staticmethod
    def take(stager: Stager, step: int, state: Any) -> Snapshot:
        """Stage a state. When this returns, it may be changed.

        Raises:
            UnstageableError: something in it cannot be copied or pickled.
        """
        staged: Any = stager.stage(state)
        file = io.BytesIO()
        pickler = _StructurePickler(file)
        try:
            pickler.dump(staged)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UnstageableError("state_dict", f"holds an object that cannot be sent: {error}") from error
        slabs, places = _slabs_of(pickler.storages)
        return Snapshot(step, places, slabs, file.getvalue())

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs."""
        return sum(slab.nbytes for slab in self.slabs)

    @cached_property
    def header(self) -> bytes:
        """The header, not signed. The first to ask has the slabs hashed."""
        slab_bytes = [slab.nbytes for slab in self.slabs]
        return Header(
            self.step, slab_bytes, [digest_of(slab) for slab in self.slabs], self.places, self.structure
        ).to_bytes()

    def parcel(self, signed_header: bytes) -> Parcel:
        """What an ``Exchange`` sends."""
        return Parcel(signed_header, self.slabs)


def digest_of(slab: torch.Tensor) -> str:
    """Return the xxh3_128 of a slab, hex. Releases the GIL while it hashes."""
    return xxhash.xxh3_128_hexdigest(bytes_at(slab.data_ptr(), slab.nbytes))


def storages_in(header: Header, slabs: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    """Return the storages of a header, over the slabs that were received."""
    empty = torch.UntypedStorage(0, device="cpu")
    return [empty if slab == _EMPTY else slabs[slab][start : start + nbytes] for slab, start, nbytes in header.places]


class _StructurePickler(pickle.Pickler):
    """Pickles a state as ``torch.save`` does.

    Attributes:
        storages: by number.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}  # by identity of the storage

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, kind = obj._untyped_storage, getattr(torch, obj._pickle_storage_type())
            count = obj._size()
        elif isinstance(obj, torch.UntypedStorage):
            storage, kind, count = obj, torch.storage.UntypedStorage, obj.nbytes()
        else:
            return None
        if storage.device.type != "cpu":
            raise pickle.PicklingError(f"a tensor on device {storage.device}, which has no bytes to send")
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return ("storage", kind, str(number), "cpu", count)


def _slabs_of(storages: list[torch.UntypedStorage]) -> tuple[tuple[torch.Tensor, ...], list[Place]]:
    """Find the stretches of memory that hold some storages: few, because small storages lie side by side."""
    extents: list[tuple[int, int, int, torch.UntypedStorage]] = []  # owner, start in it, number of the storage, owner
    for number, storage in enumerate(storages):
        owner, start = storage, 0
        if isinstance(storage, SharedSlice) and storage.mapping is not None:
            owner, start = storage.mapping, storage.offset
        extents.append((owner.data_ptr(), start, number, owner))
    extents.sort(key=lambda extent: extent[:3])
    places: list[Place] = [(_EMPTY, 0, 0)] * len(storages)
    stretches: list[list[Any]] = []  # of each slab: owner, start and end in it
    for _, start, number, owner in extents:
        nbytes = storages[number].nbytes()
        if not nbytes:
            continue
        last = stretches[-1] if stretches else None
        if last is None or last[0].data_ptr() != owner.data_ptr() or start - last[2] >= _GAP_BYTES:
            stretches.append(last := [owner, start, start])
        last[2] = start + nbytes
        places[number] = (len(stretches) - 1, start - last[1], nbytes)
    return tuple(as_bytes(owner)[start:end] for owner, start, end in stretches), places


def check_received(header: Header, slab: int, memory: torch.Tensor) -> None:
    """Compare a slab with its hash.

    Raises:
        ReplicationError: it is not what was sent.
    """
    if digest_of(memory) != header.digests[slab]:
        raise ReplicationError(
            f"the snapshot of step {header.step} is refused: its bytes {slab + 1} of {len(header.digests)} arrived with "
            "another hash than they were sent with; look at the network and the memory of both hosts"
        )
