"""Tensors that several ranks wrote in chunks, put together.

To everything else such a tensor is one item more: a *whole*, numbered behind the items of the checkpoint, which has a
dtype, a shape and C order, and no bytes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.layout import Item, contiguous_stride
from stager.workers.checkpoint.layout.structure import Chunks, Node
from stager.workers.checkpoint.read.blob_reader import BlobReader, Wanted
from stager.workers.memory.pages import bytes_at


@dataclass(frozen=True, slots=True)
class Wholes:
    """Attributes:
    manifest: with the wholes among its items, and no chunks in its structure.
    chunks: of each whole, by its number.
    """

    manifest: Manifest
    chunks: dict[int, Chunks]


def with_wholes(manifest: Manifest) -> Wholes:
    items = list(manifest.layout.items)
    numbers: dict[Chunks, int] = {}  # tied tensors have equal chunks, and are one whole

    def visit(node: Node) -> Node:
        if type(node) is int:
            return node
        if node[0] == "chunks":
            one = Chunks.from_node(node)
            if one not in numbers:
                numbers[one] = len(items)
                items.append(_item(one, items[one.parts[0][1]].dtype))
            return numbers[one]
        position = 1 if node[0] == "list" else 2
        return [*node[:position], [visit(child) for child in node[position]], *node[position + 1 :]]

    structure = visit(manifest.layout.structure)
    chunks = {number: one for one, number in numbers.items()}
    if not chunks:
        return Wholes(manifest, chunks)
    layout = replace(manifest.layout, items=tuple(items), structure=structure)
    return Wholes(replace(manifest, layout=layout), chunks)


def _item(chunks: Chunks, dtype: str) -> Item:
    nbytes = math.prod(chunks.shape) * dtype_of(dtype).itemsize
    return Item("tensor", -1, 0, nbytes, 0, nbytes, dtype, chunks.shape, contiguous_stride(chunks.shape))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk goes.

    Attributes:
        index: of the chunk's item.
        tensor: the view of the whole that it fills.
        takes_bytes: its memory is one stretch, in the order in which the chunk is stored.
    """

    index: int
    tensor: torch.Tensor
    takes_bytes: bool

    def fill(self, item: Item, reader: BlobReader) -> None:
        """By way of memory for the chunk.

        Raises:
            CorruptCheckpointError, StorageError
        """
        chunk = new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)
        reader.read([Wanted(self.index, bytes_at(chunk.data_ptr(), item.data_nbytes))])
        self.tensor.copy_(chunk)


def places(whole: torch.Tensor, chunks: Chunks, items: tuple[Item, ...]) -> Iterator[Place]:
    """Of every chunk. ``whole`` is on the host and has the items' dtype."""
    for offsets, index in chunks.parts:
        item, view = items[index], whole.detach()
        for dim, (offset, length) in enumerate(zip(offsets, item.shape, strict=True)):
            view = view.narrow(dim, offset, length)
        in_order = view.is_contiguous() and item.stride == contiguous_stride(item.shape)
        yield Place(index, view, in_order or not item.data_nbytes)
