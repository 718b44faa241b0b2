"""What an on-disk format has to say. Ranges, hashes, receipts, commit and reading are the same for all of them.

    trainer   lay_out     tensors -> items and files, before the first byte is written; kept as long as the plan
              templates   the tensors' items -> what workers would need torch for, made once and sent along
              object_blob a value -> the bytes of its item
              closing     the objects' blobs -> the blob that ends the file, for a format that needs one
    worker    frames      an item -> the bytes before and after its raw bytes
    commit    index_files small files that readers of the format start from

Whoever computes bytes has the layout and the templates only, so trainer and workers come to the same ones. Workers do
without torch: importing it takes more than a second and more memory than everything else they need. So what needs it (the
trainer's part, and making templates for a layout that came without) imports it when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stager.workers.checkpoint.layout.dtype_sizes import itemsize_of
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES, FileSpec, Item, Layout, align
from stager.workers.checkpoint.layout.structure import Path, describe, fqn
from stager.workers.checkpoint.layout.templates import Templates

if TYPE_CHECKING:
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

SMALLEST_FILE_BYTES = 1 << 20  # below this a file of its own costs more than it brings

Split = Callable[[Sequence["TensorSpec"], Sequence[int]], list[list[int]]]
"""From tensors and what each takes in a file, bytes, to the files they go into: numbers of tensors, none without any."""

Frames = Callable[[int], tuple[bytes, bytes]]
"""From an item's number to the bytes before and after its raw bytes; ``(b"", b"")`` for what is no tensor."""

Closing = Callable[[Sequence[bytes]], bytes]
"""From the objects' blobs to the blob that comes behind them. It is in the checkpoint as an item of the kind "frame"."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be an item.

    Attributes:
        paths: every place that it has in the state; more than one if it is tied.
        dtype, shape, stride: as in :class:`stager.workers.checkpoint.layout.layout.Item`.
    """

    paths: tuple[Path, ...]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its first name in the checkpoint."""
        return fqn(self.paths[0])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize_of(self.dtype)

    def describe(self) -> str:
        """As a user would write it."""
        return describe(self.paths[0])


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Attributes:
    order: of each item, its number among the tensors that were given.
    items: in file order; without places in a slab.
    files: what they are in.
    """

    order: Sequence[int]
    items: tuple[Item, ...]
    files: tuple[FileSpec, ...]


class Format(Protocol):
    """Attributes:
    row_major: tensors lie in C order, whatever their strides were.
    one_file: it has no other, so that any change is a change of that one: no incremental saves.
    """

    row_major: bool
    one_file: bool

    def holds(self, dtype: str) -> bool:
        """Whether a tensor of this dtype is stored as a tensor. Others are stored as objects."""

    def lay_out(self, tensors: Sequence[TensorSpec], rank: int, split: Split) -> LaidOut:
        """
        Args:
            split: which tensors share a file, where the format has more than one.

        Raises:
            UnstageableError: a tensor that cannot be written; names its key path.
        """

    def templates(self, tensors: Sequence[Item]) -> Templates: ...

    def frames(self, layout: Layout) -> Frames: ...

    def object_blob(self, value: object, leaf: int) -> bytes:
        """A pickled object. ``leaf`` is the same in every save of a state, and no other leaf of it has it."""

    def object_file_name(self, rank: int) -> str:
        """Where objects go: behind the tensors' files, or at the end of the last one if it is that one's name."""

    def closing(self, plan: LayoutPlan) -> Closing | None: ...

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """By name."""


@dataclass(frozen=True, slots=True)
class Framed:
    """A tensor as it will be in a file: bytes before, of, and after its values."""

    spec: TensorSpec
    head: int
    data: int
    tail: int

    @property
    def nbytes(self) -> int:
        return self.head + self.data + self.tail


def evenly(num_files: int) -> Split:
    """Runs of about the same number of bytes, at most ``num_files``."""
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
    """The item of a tensor whose blob starts at ``offset``; ``head``, ``data``, ``tail`` are lengths in bytes."""
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


def lay_out_blobs(framed: Sequence[Framed], names: Callable[[int], str], split: Split) -> LaidOut:
    """Blobs one after the other at multiples of 64 bytes."""
    items: list[Item] = []
    files: list[FileSpec] = []
    runs = split([one.spec for one in framed], [align(one.nbytes) for one in framed])
    for file, run in enumerate(runs):
        offset = 0
        for number in run:
            one = framed[number]
            items.append(tensor_item(one.spec, file, offset, one.head, one.data, one.tail))
            offset = align(offset + one.nbytes, BLOB_ALIGN_BYTES)
        files.append(FileSpec(names(file), offset))
    return LaidOut([number for run in runs for number in run], tuple(items), tuple(files))
