"""The contract of an on-disk format. Partition, hashes, receipts, commit and reading are the same for all formats.

    trainer   lay_out            tensors -> items and files, before the first byte is written; kept as long as the plan
              templates          the tensors' items -> bytes that only torch can make; made once, sent to the workers
              object_blob        a value -> the bytes of its item
              trailer            the objects' blobs -> the blob that ends the file, for a format that needs one
    worker    headers_and_tails  an item -> the bytes before and after its raw bytes
    commit    index_files        small files that readers of the format start from

All bytes follow from the layout and the templates, so trainer and workers compute the same ones. Workers run without
torch: importing it takes more than a second, and more memory than everything else they need. A function that needs torch
(those of the trainer, and making templates for a layout that came without) imports it when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stager.workers.checkpoint.layout.dtype_sizes import itemsize_of
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES, FileSpec, Item, Layout, align
from stager.workers.checkpoint.layout.plan_cache import Templates
from stager.workers.checkpoint.layout.structure import Path, describe

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

SMALLEST_FILE_BYTES = 1 << 20  # a smaller file costs more time than a second writer saves

Split = Callable[[Sequence["TensorSpec"], Sequence[int]], list[list[int]]]
"""From tensors, and the bytes that each takes, to files: the indices of each file's tensors. No file is empty."""

HeadersAndTails = Callable[[int], tuple[bytes, bytes]]
"""From an item's index to the bytes before and after its raw bytes; ``(b"", b"")`` if it is not a tensor."""

Trailer = Callable[[Sequence[bytes]], Sequence[bytes]]
"""From the objects' blobs to the blobs that follow them: one, an item of kind "frame" (a trailer); or none."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be an item.

    Attributes:
        paths: its key paths in the state; more than one if it is tied.
        names: its names in the checkpoint, in the same order.
        dtype, shape, stride: as in :class:`stager.workers.checkpoint.layout.layout.Item`.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of its raw bytes."""
        return math.prod(self.shape) * itemsize_of(self.dtype)

    def describe(self) -> str:
        """Return its first key path as a user would write it."""
        return describe(self.paths[0])


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Where a format puts tensors.

    Attributes:
        order: of each item, the index of its tensor among those that were given.
        items: in file order; without places in a slab.
        files: the files that contain them.
    """

    order: Sequence[int]
    items: tuple[Item, ...]
    files: tuple[FileSpec, ...]


class Format(Protocol):
    """What a format module provides.

    Attributes:
        row_major: tensors are stored in C order, whatever their strides were.
        one_file: everything is in one file. A change anywhere changes that file, so there are no incremental saves.
        has_recipes: mappings with a class or keys of their own, and tensors made of tensors, are stored as their parts
            and a recipe. A format whose readers know the whole structure stores them as objects.
        has_chunks: a tensor may be stored in chunks.
    """

    row_major: bool
    one_file: bool
    has_recipes: bool
    has_chunks: bool

    def holds(self, dtype: str) -> bool:
        """Return whether tensors of this dtype are stored as tensors; the others are stored as objects."""

    def lay_out(self, tensors: Sequence[TensorSpec], rank: int, split: Split) -> TensorLayout:
        """Decide where each tensor goes.

        Args:
            rank: of the trainer process; part of the file names.
            split: which tensors share a file, if the format has more than one file.

        Raises:
            UnstageableError: the format cannot hold a tensor; the error names its key path.
        """

    def templates(self, tensors: Sequence[Item]) -> Templates:
        """Make the bytes that only torch can make. Needs torch."""

    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
        """Return the function that gives the bytes around an item's raw bytes."""

    def object_blob(self, value: object, leaf: int) -> PickledObject:
        """Pickle an object. ``leaf`` is unique in the state, and the same in every save of it."""

    def object_file_name(self, rank: int) -> str:
        """Return the name of the objects' file. If it is the last tensor file's, objects go to the end of that file."""

    def trailer(self, plan: LayoutPlan) -> Trailer:
        """Return the function that makes the trailer, or :func:`no_trailer`."""

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """Return the bytes of each index file, by name.

        Args:
            save_id: of the save.
            directory: the final path of the checkpoint.
        """


@dataclass(frozen=True, slots=True)
class BlobSizes:
    """A tensor and the sizes of its blob: header, raw bytes and tail, in bytes."""

    spec: TensorSpec
    head: int
    data: int
    tail: int

    @property
    def nbytes(self) -> int:
        """Size of the blob."""
        return self.head + self.data + self.tail


def no_trailer(blobs: Sequence[bytes]) -> Sequence[bytes]:
    """Add nothing: the trailer of a format whose files end with the last object."""
    return ()


def evenly(num_files: int) -> Split:
    """Split tensors into at most ``num_files`` runs of about the same number of bytes."""
    return lambda tensors, nbytes: _runs(nbytes, num_files)


def _runs(nbytes: Sequence[int], num_files: int) -> list[list[int]]:
    total = sum(nbytes)
    num_files = max(1, min(num_files, total // SMALLEST_FILE_BYTES))
    runs: list[list[int]] = [[] for _ in range(num_files)]
    file, done = 0, 0
    for number, size in enumerate(nbytes):
        while file < num_files - 1 and done * num_files >= total * (file + 1):
            file += 1
        runs[file].append(number)
        done += size
    return [run for run in runs if run]


def tensor_item(spec: TensorSpec, file: int, offset: int, head: int, data: int, tail: int) -> Item:
    """Make the item of a tensor whose blob starts at ``offset``; ``head``, ``data`` and ``tail`` are lengths in bytes."""
    return Item(
        kind="tensor",
        file=file,
        offset=offset,
        nbytes=head + data + tail,
        data_offset=offset + head,
        data_nbytes=data,
        dtype=spec.dtype,
        shape=spec.shape,
        stride=spec.stride,
    )


def lay_out_blobs(sizes: Sequence[BlobSizes], names: Callable[[int], str], split: Split) -> TensorLayout:
    """Lay out blobs one after the other, each at a multiple of 64 bytes."""
    items: list[Item] = []
    files: list[FileSpec] = []
    runs = split([one.spec for one in sizes], [align(one.nbytes) for one in sizes])
    for file, run in enumerate(runs):
        offset = 0
        for number in run:
            one = sizes[number]
            items.append(tensor_item(one.spec, file, offset, one.head, one.data, one.tail))
            offset = align(offset + one.nbytes, BLOB_ALIGN_BYTES)
        files.append(FileSpec(names(file), offset))
    return TensorLayout([number for run in runs for number in run], tuple(items), tuple(files))
