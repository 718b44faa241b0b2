"""Tensors that several ranks wrote in chunks.

The rest of ``loading`` sees such a tensor as one more item, called a *whole*. Wholes are numbered after the items of the
checkpoint. A whole has a dtype, a shape and C order; its bytes are those of its chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.checkpoint.layout.structure import Chunks, has_chunks, map_leaves
from stager.workers.checkpoint.read.blob_reader import BlobReader


@dataclass(frozen=True, slots=True)
class Wholes:
    """A manifest without chunks, and what each whole is made of.

    Attributes:
        manifest: has the wholes among its items, and no chunks in its structure.
        chunks: the chunks of each whole, by the whole's item number.
    """

    manifest: Manifest
    chunks: dict[int, Chunks]


def with_wholes(manifest: Manifest) -> Wholes:
    """Replace every tensor in chunks by a whole."""
    items = manifest.layout.items
    if not has_chunks(manifest.layout.structure):  # most checkpoints
        return Wholes(manifest, {})
    wholes: list[Item] = []
    numbers: dict[Chunks, int] = {}  # tied tensors have equal chunks, so they become one whole

    def number_of(leaf: int | Chunks) -> int:
        if isinstance(leaf, int):
            return leaf
        if leaf not in numbers:
            numbers[leaf] = len(items) + len(wholes)
            wholes.append(_item(leaf, items[leaf.parts[0][1]].dtype))
        return numbers[leaf]

    structure = map_leaves(manifest.layout.structure, number_of)
    chunks = {number: one for one, number in numbers.items()}
    layout = replace(manifest.layout, items=items.followed_by(wholes), structure=structure)
    return Wholes(replace(manifest, layout=layout), chunks)


def _item(chunks: Chunks, dtype: str) -> Item:
    nbytes = math.prod(chunks.shape) * dtype_of(dtype).itemsize
    return Item("tensor", -1, 0, nbytes, 0, nbytes, dtype, chunks.shape, contiguous_stride(chunks.shape))


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a chunk in its whole.

    Attributes:
        index: item number of the chunk.
        tensor: the view of the whole that the chunk fills.
        takes_bytes: the view is contiguous and in the order of the stored bytes, so that they can be read straight into it.
    """

    index: int
    tensor: torch.Tensor
    takes_bytes: bool

    def fill(self, item: Item, reader: BlobReader) -> None:
        """Read the chunk into memory of its own, and copy it into the whole.

        Raises:
            CorruptCheckpointError, StorageError
        """
        chunk = new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)
        reader.read([self.index], [chunk.data_ptr()])
        self.tensor.copy_(chunk)


def places(whole: torch.Tensor, chunks: Chunks, items: Sequence[Item]) -> Iterator[Place]:
    """Yield the place of every chunk. ``whole`` is on the CPU and has the dtype of the items."""
    for offsets, index in chunks.parts:
        item, view = items[index], whole.detach()
        for dim, (offset, length) in enumerate(zip(offsets, item.shape, strict=True)):
            view = view.narrow(dim, offset, length)
        in_order = view.is_contiguous() and item.stride == contiguous_stride(item.shape)
        yield Place(index, view, in_order or not item.data_nbytes)
