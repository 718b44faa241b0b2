"""Reading the items of a DCP load plan from a checkpoint of stager, straight into the targets where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from stager.loading.dcp.index import Index
from stager.loading.dcp.objects import hand_over_object
from stager.loading.reading.direct_read import overlapping, takes_bytes, tell_autograd
from stager.loading.reading.plain_reader import PlainReader
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.errors import StateMismatchError

_BATCH_BYTES = 256 << 20  # memory used beside the targets; one item may need more


def read_plan(
    index: Index, reader: BlobReader | PlainReader, plan: LoadPlan, planner: LoadPlanner, allow_pickle: bool = False
) -> None:
    """Carry out a load plan of DCP.

    Args:
        index: of the checkpoint.
        reader: of the checkpoint; a ``BlobReader`` checks each hash.
        plan: what to read.
        planner: has the targets.
        allow_pickle: unpickle any object.

    Raises:
        CorruptCheckpointError, UnsafePickleError, StorageError
    """
    _Load(index, reader, planner, allow_pickle).run(plan)


@dataclass(frozen=True, slots=True)
class _Read:
    """A read item of DCP, the item of the checkpoint that it needs, and the tensor that receives it."""

    request: ReadItem
    number: int
    target: torch.Tensor


class _Load:
    """One call of ``read_data()``."""

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
        shared = overlapping(range(len(reads)), [read.target for read in reads])
        direct: list[_Read] = []
        copied: list[_Read] = []
        for position, read in enumerate(reads):
            is_direct = position not in shared and _is_direct(read, self._items[read.number])
            (direct if is_direct else copied).append(read)
        self._fill(direct)
        self._copy(copied)
        for read in reads:
            self._planner.commit_tensor(read.request, read.target)

    def _load_objects(self, requests: list[tuple[ReadItem, int]]) -> None:
        blobs = {number: bytearray(self._items[number].data_nbytes) for _, number in requests}
        numbers = sorted(blobs)
        self._reader.read(numbers, [memoryview(blobs[number]) for number in numbers])
        for request, number in requests:
            hand_over_object(self._planner, request, bytes(blobs[number]), self._index.path, self._allow_pickle)

    def _fill(self, reads: list[_Read]) -> None:
        """Read straight into the targets."""
        in_order = sorted(reads, key=lambda read: read.number)
        self._reader.read([read.number for read in in_order], [read.target.data_ptr() for read in in_order])
        tell_autograd(read.target for read in reads)

    def _copy(self, reads: list[_Read]) -> None:
        """Read into memory of our own, and copy in the order of the plan: where targets share memory, the last one wins."""
        for batch in self._batches(reads):
            sources = {read.number: _new(self._items[read.number]) for read in batch}
            numbers = sorted(sources)
            self._reader.read(numbers, [sources[number].data_ptr() for number in numbers])
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
            f"{read.request.dest_index.fqn}: has shape {list(read.target.shape)} in the target and "
            f"{list(read.request.lengths)} in the checkpoint"
        )


def _is_direct(read: _Read, item: Item) -> bool:
    """Whether the stored bytes can go straight into the target's memory."""
    target = read.target
    return (
        tuple(target.shape) == item.shape  # so the request, which has the target's shape, is for the whole item
        and type(target) is torch.Tensor
        and not target.is_quantized
        and target.dtype == dtype_of(item.dtype)
        and takes_bytes(item, target)
    )


def _new(item: Item) -> torch.Tensor:
    return new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)
