"""Where every byte of a checkpoint comes from and goes to: decided by the trainer before the first byte is written.

Contract between ``stager.state.snapshot_plan`` (makes it), ``stager.workers.checkpoint.commit.persist`` (writes by it) and ``stager.workers.checkpoint.directory.manifest``
(records it).

An *item* is one tensor, one pickled object, or a *frame*: bytes that a format needs at the end of a file and no leaf of
the state names. In its file it is a *blob*: for a tensor a header, the raw bytes, and a tail (in the ``dcp`` format each
blob is a complete ``torch.save`` file); for the others only bytes. An item's *span* runs from its blob's start to the next
item's, padding included, so that the spans of a file tile it. Spans are cut into *segments* of at most ``segment_bytes``;
each segment is written by one worker and has one hash. Hence every byte of every file is covered by exactly one hash.

As JSON, items are rows (``ROW_COLUMNS``), because there can be hundreds of thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

from stager.workers.checkpoint.layout.plan_cache import Memo
from stager.workers.checkpoint.layout.structure import Node

BLOB_ALIGN_BYTES = 64  # what torch.save aligns a storage to within its file

ROW_COLUMNS = ("kind", "file", "offset", "nbytes", "data_offset", "data_nbytes", "dtype", "shape", "stride")


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor, object or frame.

    Attributes:
        kind: "tensor", "object" or "frame".
        file: index into ``Layout.files``.
        offset: of the blob in its file, bytes.
        nbytes: length of the blob.
        data_offset: of the raw bytes in the file.
        data_nbytes: length of the raw bytes.
        dtype: "float32", ...; "" for the others.
        shape, stride: in elements; () for the others.
        slab_offset: of the raw bytes in the slab; -1 when not known (a manifest).
    """

    kind: str
    file: int
    offset: int
    nbytes: int
    data_offset: int
    data_nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    slab_offset: int = -1

    def to_row(self) -> list[Any]:
        """As ``ROW_COLUMNS``."""
        return [
            self.kind,
            self.file,
            self.offset,
            self.nbytes,
            self.data_offset,
            self.data_nbytes,
            self.dtype,
            self.shape,
            self.stride,
        ]

    @staticmethod
    def from_row(row: Sequence[Any], slab_offset: int = -1) -> Item:
        kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride = row
        return Item(
            kind, file, offset, nbytes, data_offset, data_nbytes, dtype, tuple(shape), tuple(stride), slab_offset
        )


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file of the checkpoint: its name inside the directory and its exact size."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole checkpoint.

    Attributes:
        files: data files, in order; each item's ``file`` points here.
        items: in file order, then by offset.
        structure: see :mod:`stager.workers.checkpoint.layout.structure`; its leaves are indices into ``items``.
        segment_bytes: the largest stretch that one hash covers.
        memo: shared by the layouts of one plan.
    """

    files: tuple[FileSpec, ...]
    items: tuple[Item, ...]
    structure: Node
    segment_bytes: int
    memo: Memo = field(default_factory=Memo, init=False, compare=False, repr=False)

    def sharing(self, memo: Memo) -> Layout:
        """This new layout, with what is known of its plan."""
        object.__setattr__(self, "memo", memo)
        return self

    def ends(self) -> list[int]:
        """Of each item: where its span ends in the file."""
        return self.memo.of_save("ends", self.varying, lambda: [end for _, _, end in self.spans()])

    @property
    def varying(self) -> tuple[Any, ...]:
        """What of this layout is its own, and not its plan's."""
        return self.files, self.items[self.memo.num_fixed :]

    def spans(self) -> Iterator[tuple[int, Item, int]]:
        """(index, item, end of its span in the file)."""
        for index, item in enumerate(self.items):
            following = index + 1
            if following < len(self.items) and self.items[following].file == item.file:
                yield index, item, self.items[following].offset
            else:
                yield index, item, self.files[item.file].nbytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes ``start`` to ``end`` of a file, all within the span of item ``index``."""

    index: int
    start: int
    end: int


def segments(layout: Layout) -> Iterator[Segment]:
    """Every segment, in file order; their number per item is what :func:`num_segments` says."""
    step = layout.segment_bytes
    for index, item, end in layout.spans():
        if end - item.offset <= step:  # most
            yield Segment(index, item.offset, end)
        else:
            for start in range(item.offset, end, step):
                yield Segment(index, start, min(start + step, end))


def num_segments(span_nbytes: int, segment_bytes: int) -> int:
    return max(1, -(-span_nbytes // segment_bytes))


def deal(layout: Layout, num_parts: int, whole_bytes: int = 0) -> list[list[Segment]]:
    """Cut the segments into ``num_parts`` runs of about the same number of bytes.

    Runs are contiguous, so a part mostly has a file of its own (two writers of one file wait for its inode's lock).

    Args:
        whole_bytes: files up to this size go to one part as a whole: only who has all of a file can link it.
    """
    total = sum(file.nbytes for file in layout.files)
    parts: list[list[Segment]] = [[] for _ in range(num_parts)]
    part, done = 0, 0
    for unit in _units(layout, whole_bytes):
        nbytes = unit[-1].end - unit[0].start
        middle = done + nbytes / 2
        while part < num_parts - 1 and middle * num_parts >= total * (part + 1):
            part += 1
        parts[part] += unit
        done += nbytes
    return parts


def _units(layout: Layout, whole_bytes: int) -> Iterator[list[Segment]]:
    """What goes to one part: a segment, or all those of a file."""
    if not whole_bytes:
        yield from ([segment] for segment in segments(layout))
        return
    for file, group in groupby(segments(layout), key=lambda segment: layout.items[segment.index].file):
        if layout.files[file].nbytes <= whole_bytes:
            yield list(group)
        else:
            yield from ([segment] for segment in group)


def deal_once(layout: Layout, num_parts: int, whole_bytes: int = 0) -> list[list[Segment]]:
    """As :func:`deal`, kept for the next save of the plan. Not to be changed."""
    key = num_parts, whole_bytes, layout.varying
    return layout.memo.of_save("deal", key, lambda: deal(layout, num_parts, whole_bytes))


@lru_cache(maxsize=4096)  # models have many tensors and few shapes
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements, last dimension fastest."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


def align(offset: int, to: int = BLOB_ALIGN_BYTES) -> int:
    return -(-offset // to) * to
