"""Sharded tensors of the target: each rank reads its own boxes, whatever kind of tensor has them (``state/shards.py``).

A box is cut out of the whole tensor, or out of the chunks that other ranks wrote. So the number of ranks and the placements
may differ from those of the save. The ranks exchange nothing. DCP finds which part of which chunk a box needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from stager.loading.dcp.index import Index
from stager.loading.dcp.read_plan import read_plan
from stager.state.shards import shard_of, views_of
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.structure import Chunks
from stager.workers.checkpoint.read.blob_reader import BlobReader


@dataclass(frozen=True, slots=True)
class Sharded:
    """A sharded tensor of the target, the item or whole that it receives, and its key path."""

    index: int
    name: str
    tensor: torch.Tensor


def fill_sharded(
    path: str, manifest: Manifest, wholes: Mapping[int, Chunks], reader: BlobReader, sharded: Sequence[Sharded]
) -> None:
    """Read this rank's boxes of each tensor.

    Args:
        path: the checkpoint's directory.
        manifest: of the checkpoint, as it is stored.
        wholes: the chunks of each whole, by its number.
        reader: of the checkpoint.
        sharded: their global shapes equal those of the checkpoint; other dtypes are converted.

    Raises:
        CorruptCheckpointError, StorageError
    """
    boxes = _Boxes(path, manifest)
    for one in sharded:
        item = manifest.layout.items[one.index] if one.index not in wholes else None
        chunks = wholes[one.index] if item is None else Chunks(item.shape, (((0,) * len(item.shape), one.index),))
        boxes.add(one, chunks)
    read_plan(boxes.index, reader, LoadPlan(boxes.requests), cast(LoadPlanner, boxes))


class _Boxes:
    """The boxes to fill: what DCP's read plan asks a load planner for.

    Attributes:
        index: where the chunks are.
        requests: which part of which chunk goes where in which box.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.index = Index(path, manifest, Metadata({}), {})
        self.requests: list[ReadItem] = []
        self._views: dict[MetadataIndex, torch.Tensor] = {}

    def add(self, sharded: Sharded, chunks: Chunks) -> None:
        shard = shard_of(sharded.tensor, sharded.name)
        if shard is None:
            return
        # Two tensors may have one key path: an optimizer's and that of its state dict. So their number is in the name.
        name = f"{sharded.name} {len(self._views)}"
        stored = self._stored(name, chunks)
        wanted = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths)) for box in shard.boxes]
        self.requests += create_read_items_for_chunk_list(name, stored, wanted)
        views: Sequence[Any] = views_of(sharded.tensor) if shard.boxes else ()
        for box, view in zip(shard.boxes, views, strict=True):
            self._views[MetadataIndex(name, torch.Size(box.offsets))] = view

    def _stored(self, name: str, chunks: Chunks) -> TensorStorageMetadata:
        items = self.index.manifest.layout.items
        found = []
        for offsets, number in chunks.parts:
            at = torch.Size(offsets)
            found.append(ChunkStorageMetadata(at, torch.Size(items[number].shape)))
            self.index.items[MetadataIndex(name, at)] = number
        dtype = dtype_of(items[chunks.parts[0][1]].dtype)
        return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(chunks.shape), found)

    def resolve_tensor(self, request: ReadItem) -> torch.Tensor:
        view = self._views[MetadataIndex(request.dest_index.fqn, request.dest_index.offset)]
        return narrow_tensor_by_index(view, request.dest_offsets, request.lengths)

    def commit_tensor(self, request: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view of the target's memory."""
