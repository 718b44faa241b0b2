"""A checkpoint of ``dcp.save`` as restoring asks for it: the values of all its ranks. Only what is wanted is read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from stager.loading.dcp.stock import StockReader
from stager.state.shards import Box
from stager.workers.checkpoint.documents.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.layout.dtypes import dtype_of, name_of, new_tensor
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import Layout, contiguous_stride
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError, StagerError, UsageError


class StockCheckpoint:
    """See :class:`stager.loading.foreign_restore.ForeignCheckpoint`.

    Args:
        path: the checkpoint's directory.
        allow_pickle: unpickle any object, which runs code from the checkpoint.
        safe_globals: classes that may be unpickled, beside plain data.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """

    keeps_keys = False

    def __init__(self, path: str, allow_pickle: bool, safe_globals: Sequence[str]) -> None:
        self.path = path
        self._reader = StockReader(path, allow_pickle, safe_globals)
        self._metadata = self._reader.read_metadata()
        self._names = list(self._metadata.state_dict_metadata)
        try:
            layout = Layout((), Items.of(map(self._item, self._names)), _structure(self._metadata), 1)
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # allow_pickle: nobody has checked it
            raise CorruptCheckpointError(path, f"its .metadata cannot be understood: {error}") from error
        self.manifest = Manifest(ManifestHeader("dcp", 0, "", 0.0, "", ""), layout, (), ())

    def _item(self, name: str) -> Item:
        described = self._metadata.state_dict_metadata[name]
        if not isinstance(described, TensorStorageMetadata):
            return Item("object", 0, 0, 0, 0, 0, "", (), ())
        shape, dtype = tuple(described.size), described.properties.dtype
        if name_of(dtype).startswith("q"):
            raise UsageError(
                f"{self.path}: {name} is quantized, and stager cannot read such a tensor of dcp.save; load it by dcp.load"
            )
        nbytes = described.size.numel() * dtype.itemsize
        return Item("tensor", 0, 0, nbytes, 0, nbytes, name_of(dtype), shape, contiguous_stride(shape))

    def objects(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Unpickle objects, by item.

        Raises:
            UnsafePickleError: the ``weights_only`` rules do not allow one.
            CorruptCheckpointError, UnloadableError, StorageError
        """
        reading = _Reading()
        requests = [_request_of_object(self._names[number]) for number in numbers]
        self._carry_out(requests, reading)
        return {number: reading.objects[self._names[number]] for number in numbers}

    def tensors(self, wanted: Sequence[tuple[int, Box | None]]) -> list[torch.Tensor]:
        """Read tensors, or boxes of them, into new memory.

        Raises:
            CorruptCheckpointError, StorageError
        """
        reading = _Reading()
        requests: list[ReadItem] = []
        for number, box in wanted:
            requests += self._requests(number, box, reading)
        self._carry_out(requests, reading)
        return reading.tensors

    def _requests(self, number: int, box: Box | None, reading: _Reading) -> list[ReadItem]:
        item, name = self.manifest.layout.items[number], self._names[number]
        offsets, lengths = ((0,) * len(item.shape), item.shape) if box is None else (box.offsets, box.lengths)
        dtype = dtype_of(item.dtype)
        nbytes = torch.Size(lengths).numel() * dtype.itemsize
        place = reading.add(new_tensor(dtype, lengths, contiguous_stride(lengths), nbytes))
        described = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[name])
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
        requests = create_read_items_for_chunk_list(name, described, [chunk])
        return [replace(request, dest_index=MetadataIndex(place)) for request in requests]

    def _carry_out(self, requests: list[ReadItem], reading: _Reading) -> None:
        if not requests:
            return
        with torch.device("cpu"), storage_errors("read", self.path):
            try:
                self._reader.read_data(LoadPlan(requests), cast(LoadPlanner, reading), self._metadata)
            except StagerError:  # some are RuntimeErrors, too
                raise
            except (RuntimeError, ValueError, KeyError, AssertionError, EOFError) as error:
                raise CorruptCheckpointError(self.path, f"cannot be read: {error}") from error


class _Reading:
    """What a reader asks of a planner: where tensors go, and what to do with objects.

    Attributes:
        tensors: in the order of :meth:`add`.
        objects: by name.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.objects: dict[str, Any] = {}

    def add(self, tensor: torch.Tensor) -> str:
        """Add a tensor that is to be filled. Returns the name that a request has to have as its destination."""
        self.tensors.append(tensor)
        return str(len(self.tensors) - 1)

    def resolve_tensor(self, request: ReadItem) -> torch.Tensor:
        whole = self.tensors[int(request.dest_index.fqn)]
        return narrow_tensor_by_index(whole, request.dest_offsets, request.lengths)

    def commit_tensor(self, request: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view."""

    def load_bytes(self, request: ReadItem, value: io.BytesIO) -> None:
        self.objects[request.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=False)


def _request_of_object(name: str) -> ReadItem:
    index, nowhere = MetadataIndex(name), torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)


def _structure(metadata: Metadata) -> Node:
    """Put the names into the containers that their key paths tell of; a name without a key path stays at the top.

    Raises:
        ValueError: one name has a value where another has a container.
    """
    top: dict[Any, Any] = {}
    paths = metadata.planner_data or {}
    for number, name in enumerate(metadata.state_dict_metadata):
        *containers, last = paths.get(name, (name,))
        place = top
        for key in containers:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name} lies in a value")
        if last in place:
            raise ValueError(f"{name} is in the place of another")
        place[last] = number
    return _node(top)


def _node(value: dict[Any, Any] | int) -> Node:
    """Make the node of a container. Positions in a list that have no entry were mappings without values."""
    if isinstance(value, int):
        return value
    if any(type(key) is int for key in value):
        if not all(type(key) is int for key in value):
            raise ValueError(f"a list has the key {next(key for key in value if type(key) is not int)!r}")
        return ["list", [_node(value.get(position, {})) for position in range(max(value) + 1)]]
    return ["dict", list(value), [_node(child) for child in value.values()]]
