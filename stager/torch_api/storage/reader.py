"""``StagerStorageReader``: ``dcp.load`` of stager's checkpoints, into place, each hash checked; and of stock ones."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from stager.loading.dcp.index import Index, read_index
from stager.loading.dcp.objects import hand_over_object
from stager.loading.dcp.plain_reader import PlainReader
from stager.loading.dcp.stock import StockReader
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.layout import Item
from stager.workers.checkpoint.read.blob_reader import BlobReader, Wanted
from stager.workers.checkpoint.read.verify import default_threads
from stager.workers.errors import StateMismatchError, UsageError
from stager.workers.memory.pages import bytes_at

_BATCH_BYTES = 256 << 20  # how much is held beside the targets, at least one item


class StagerStorageReader(StorageReader):
    """Reads a checkpoint: ``dcp.load(state, storage_reader=StagerStorageReader(path))``.

    A checkpoint with a manifest is read by it: nothing is unpickled but the state's own objects, and those only as far as
    ``weights_only`` allows. Whole tensors go straight into CPU targets of the same dtype and strides; everything else
    (another device, dtype or stride, a slice for another sharding) is read into memory of its own, at most 256 MiB or one
    tensor at a time, and copied. One without a manifest is read by torch's own reader.

    Args:
        path: the checkpoint's directory; ``checkpoint_id`` of ``dcp.load`` goes before it.
        num_threads: how many reads run at a time; default: the cores this process may use, at most 8.
        verify: compare the hash of every byte that is read; ``False`` takes what is there.
        allow_pickle: unpickle any object, which may run code from the checkpoint.

    Errors reach the caller as DCP wraps them: ``CheckpointException`` with ``failures`` by rank, in which there is a
    ``CorruptCheckpointError`` for damaged data; torch 2.13 turns what ``read_metadata`` raises into an ``AssertionError``
    with its text. Targets that were read before the damage was found are changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        if num_threads is not None and num_threads < 1:
            raise UsageError(f"num_threads is {num_threads}; it must be at least 1")
        self._num_threads = num_threads or default_threads()
        self._verify = verify
        self._allow_pickle = allow_pickle
        self._path = os.path.abspath(os.fspath(path))
        self._load_id = str(uuid.uuid4())
        self._index: Index | None = None
        self._metadata: Metadata | None = None

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's directory."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, from ``checkpoint_id`` if there is one."""
        if checkpoint_id:
            self._path = os.path.abspath(os.fspath(checkpoint_id))
        self._load_id = str(uuid.uuid4())
        self._index = self._metadata = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            CheckpointNotFoundError: there is no checkpoint.
            CorruptCheckpointError: its manifest is damaged, or a file is missing or has another size.
            UnsafePickleError: it is not stager's, and its ``.metadata`` holds more than metadata.
        """
        self._index = None
        if os.path.lexists(os.path.join(self._path, MANIFEST_NAME)):
            self._index = read_index(self._path, self._load_id)
            return self._index.metadata
        metadata = StockReader(self._path, self._allow_pickle).read_metadata(*args, **kwargs)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self._load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """
        Raises:
            CorruptCheckpointError: a hash does not match; names file and value.
            UnsafePickleError: an object is more than ``weights_only`` allows.
            StorageError: a read failed.
        """
        if self._metadata is None:
            raise UsageError("read_data() comes after read_metadata() and set_up_storage_reader()")
        if self._index is None:
            return StockReader(self._path, self._allow_pickle).read_data(plan, planner, self._metadata)
        kind = BlobReader if self._verify else PlainReader
        with reading(self._path), closing(kind(self._path, self._index.manifest, self._num_threads)) as reader:
            read_plan(self._index, reader, plan, planner, self._allow_pickle)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of a local or mounted file system."""
        return "://" not in os.fspath(checkpoint_id)


def read_plan(
    index: Index, reader: BlobReader | PlainReader, plan: LoadPlan, planner: LoadPlanner, allow_pickle: bool = False
) -> None:
    """Do what a plan of DCP says.

    Raises:
        CorruptCheckpointError, UnsafePickleError, StorageError
    """
    _Load(index, reader, planner, allow_pickle).run(plan)


@dataclass(frozen=True, slots=True)
class _Read:
    """One of DCP's read items, the item of the checkpoint that it needs, and the tensor it goes to."""

    request: ReadItem
    number: int
    target: torch.Tensor


class _Load:
    """One ``read_data()``."""

    def __init__(
        self, index: Index, reader: BlobReader | PlainReader, planner: LoadPlanner, allow_pickle: bool
    ) -> None:
        self._index = index
        self._items = index.manifest.layout.items
        self._reader = reader
        self._planner = planner
        self._allow_pickle = allow_pickle

    def run(self, plan: LoadPlan) -> None:
        requests = [(request, self._index.items[request.storage_index]) for request in plan.items]
        reads = [
            _Read(request, number, self._planner.resolve_tensor(request).detach())
            for request, number in requests
            if request.type != LoadItemType.BYTE_IO
        ]
        for read in reads:
            _check_shape(read)
        self._load_objects([(r, number) for r, number in requests if r.type == LoadItemType.BYTE_IO])
        shared = _sharing_memory(reads)
        direct = [read for read in reads if id(read) not in shared and _is_direct(read, self._items[read.number])]
        self._fill(direct)
        rest = {id(read) for read in reads} - {id(read) for read in direct}
        self._copy([read for read in reads if id(read) in rest])
        for read in reads:
            self._planner.commit_tensor(read.request, read.target)

    def _load_objects(self, requests: list[tuple[ReadItem, int]]) -> None:
        blobs = {number: bytearray(self._items[number].data_nbytes) for _, number in requests}
        self._reader.read([Wanted(number, memoryview(blobs[number])) for number in sorted(blobs)])
        for request, number in requests:
            hand_over_object(self._planner, request, bytes(blobs[number]), self._index.path, self._allow_pickle)

    def _fill(self, reads: list[_Read]) -> None:
        """Read straight into the targets."""
        wanted = [
            Wanted(read.number, bytes_at(read.target.data_ptr(), self._items[read.number].data_nbytes))
            for read in sorted(reads, key=lambda read: read.number)
        ]
        self._reader.read(wanted)
        for read in reads:
            if not read.target.is_inference():  # those have no version
                torch.autograd.graph.increment_version(read.target)  # it was written behind autograd's back

    def _copy(self, reads: list[_Read]) -> None:
        """Read into memory of our own, and copy, in the plan's order: the last one wins where targets share memory."""
        for batch in self._batches(reads):
            sources = {read.number: _new(self._items[read.number]) for read in batch}
            views = {number: bytes_at(t.data_ptr(), self._items[number].data_nbytes) for number, t in sources.items()}
            self._reader.read([Wanted(number, views[number]) for number in sorted(views)])
            with torch.no_grad():
                for read in batch:
                    source = sources[read.number]
                    request = read.request
                    read.target.copy_(narrow_tensor_by_index(source, request.storage_offsets, request.lengths))

    def _batches(self, reads: list[_Read]) -> Iterator[list[_Read]]:
        batch: list[_Read] = []
        numbers: set[int] = set()
        nbytes = 0
        for read in reads:
            size = 0 if read.number in numbers else self._items[read.number].data_nbytes
            if batch and nbytes + size > _BATCH_BYTES:
                yield batch
                batch, numbers, nbytes = [], set(), 0
                size = self._items[read.number].data_nbytes
            batch.append(read)
            numbers.add(read.number)
            nbytes += size
        if batch:
            yield batch


def _check_shape(read: _Read) -> None:
    if read.target.shape != read.request.lengths:
        raise StateMismatchError(
            f"{read.request.dest_index.fqn}: has shape {list(read.target.shape)} here and "
            f"{list(read.request.lengths)} in the checkpoint"
        )


def _is_direct(read: _Read, item: Item) -> bool:
    """Whether the raw bytes can go straight into the target's memory."""
    target = read.target
    return (
        tuple(target.shape) == item.shape  # the request has the same: it is for the whole item
        and type(target) is torch.Tensor
        and target.device.type == "cpu"
        and target.layout is torch.strided
        and not (target.is_conj() or target.is_neg() or target.is_quantized)
        and target.dtype == dtype_of(item.dtype)
        and (target.stride() == item.stride or not target.numel())
    )


def _new(item: Item) -> torch.Tensor:
    return new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)


def _sharing_memory(reads: list[_Read]) -> set[int]:
    """Reads (their ``id``) whose targets overlap in memory: in parallel they would tear each other."""
    extents = sorted((*_extent(read.target), id(read)) for read in reads if _has_memory(read.target))
    shared: set[int] = set()
    reach, last = -1, 0
    for start, end, read in extents:
        if start < reach:
            shared |= {read, last}
        if end > reach:
            reach, last = end, read
    return shared


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel() > 0


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The stretch of memory in which a tensor's elements lie: start and end."""
    elements = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + elements * tensor.element_size()
