"""What a snapshot is staged in: one piece that holds all of it, or several where the memory does not hold it.

    whole()   one piece, in one slab: every part of the save is written from there
    cut()     a snapshot larger than ``arena.max_host_bytes``: one part for each piece, each in a slab of its own

With several pieces, the save has more parts than there are workers, so small that the data of one fits a slab. A slab is
used again when its part is written. What is on disk, and what a crash leaves, is the same in both cases: receipts of parts,
and one commit when all parts are there. The state must not change until the last piece is copied, so ``save()`` waits for
it.

The slab of a piece (``slab_writer.py`` writes what is not tensors; the marks: ``filling.py``):

    whole     | tensors | plan | objects | objects document, sidecars ... | marks |
    one of    | the piece's stretch of tensors and objects  ... | plan | objects document, sidecars ... | marks |
    several                                                     ^ at the same place in every slab
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stager.state.copies import PACKED, Copy
from stager.state.snapshot_plan import SnapshotPlan
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import Layout, Segment, align, partition
from stager.workers.checkpoint.storage.posix.direct_io import BLOCK_BYTES
from stager.workers.errors import MemoryBudgetError
from stager.workers.memory.fill_marks import num_stretches

_MIN_SEGMENT_BYTES = 64 << 10
_SEGMENTS_PER_PIECE = 8  # parts are cut between segments, so these bound how unequal they are
_FILES_PER_PIECE = 4  # the same for files that are not to be cut
_OBJECT_SLACK = 1.25  # pickled objects grow a little from save to save; the slab should still fit
_ROW_BYTES = 256  # of an object in the objects document, at most
_DOCUMENT_BYTES = 4096  # of the objects document without its rows, at most
_ROUNDING_BYTES = 4096  # for what is aligned behind a piece: the plan, the objects document


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a whole snapshot's slab, and the parts of the save that are written from it.

    Attributes:
        parts: numbers of the parts.
        start, end: bytes of the whole snapshot's slab.
    """

    parts: range
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the stretch."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a snapshot is staged.

    Attributes:
        plan, blobs: of the snapshot (:class:`~stager.snapshot.taker.Snapshot`).
        pieces: in the order of their parts.
        items: where the pickled objects and the trailer lie, in the files and in a whole snapshot's slab.
        plan_offset: where each slab has the plan.
        marks_offset: where each slab has the marks of how far it is filled; they are the last bytes of it.
        slab_nbytes: bytes that a slab for any of the pieces needs.
        whole_bytes: files up to this size are in one part (:func:`stager.workers.checkpoint.layout.layout.partition`).
    """

    plan: SnapshotPlan
    blobs: Sequence[bytes]
    pieces: tuple[Piece, ...]
    items: tuple[Item, ...]
    plan_offset: int
    marks_offset: int
    slab_nbytes: int
    whole_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether one slab holds the snapshot, with each tensor where the plan says."""
        return len(self.pieces) == 1 and self.pieces[0].start == 0

    @property
    def num_parts(self) -> int:
        """Into how many parts the save is divided."""
        return self.pieces[-1].parts.stop


def object_items(plan: SnapshotPlan, blobs: Sequence[bytes], slab_offset: int) -> list[Item]:
    """Place the pickled objects and the trailer that may follow them: behind the tensors in the files.

    Args:
        slab_offset: where in the slab the first one lies.
    """
    items: list[Item] = []
    file, start = plan.layout.object_place
    offset = start
    for number, blob in enumerate(blobs):
        kind = "object" if number < len(plan.objects) else "frame"  # the trailer's name on disk, kept for compatibility
        nbytes, in_slab = len(blob), slab_offset + offset - start
        items.append(Item(kind, file, offset, nbytes, offset, nbytes, "", (), (), in_slab))
        offset = align(offset + nbytes)
    return items


def whole(
    plan: SnapshotPlan, blobs: Sequence[bytes], num_parts: int, whole_bytes: int = 0, sidecars_nbytes: int = 0
) -> Pieces:
    """Divide the snapshot into one piece: tensors, then the plan, then the objects, with room for objects to grow.

    Args:
        num_parts: into how many parts the save is divided.
        whole_bytes: see :class:`Pieces`.
        sidecars_nbytes: bytes of the files that are saved with it.
    """
    plan_offset = align(plan.nbytes)
    objects_offset = align(plan_offset + len(plan.document))
    items = tuple(object_items(plan, blobs, objects_offset))
    objects_nbytes = sum(align(len(blob)) for blob in blobs)
    growing = objects_nbytes + _ROW_BYTES * len(blobs) + sidecars_nbytes
    marks_offset = objects_offset + int(growing * _OBJECT_SLACK) + _DOCUMENT_BYTES
    piece = Piece(parts=range(num_parts), start=0, end=objects_offset + objects_nbytes)
    return Pieces(
        plan=plan,
        blobs=blobs,
        pieces=(piece,),
        items=items,
        plan_offset=plan_offset,
        marks_offset=marks_offset,
        slab_nbytes=marks_offset + _marks_nbytes(piece.nbytes),
        whole_bytes=whole_bytes,
    )


def _marks_nbytes(nbytes: int) -> int:
    return align(1 + num_stretches(nbytes))


def segment_bytes_for(budget_nbytes: int, configured: int) -> int:
    """Choose segments small enough to cut a snapshot into pieces of ``budget_nbytes`` bytes."""
    return max(_MIN_SEGMENT_BYTES, min(configured, budget_nbytes // _SEGMENTS_PER_PIECE))


def cut(
    plan: SnapshotPlan,
    blobs: Sequence[bytes],
    budget_nbytes: int,
    num_buffers: int,
    *,
    incremental: bool = False,
    sidecars_nbytes: int = 0,
) -> Pieces:
    """Divide the snapshot into pieces, each of which fits a slab of ``budget_nbytes`` bytes.

    Args:
        plan: one that keeps to the files' order (``Planner(in_order=True)``).
        budget_nbytes: bytes of one slab, at most.
        num_buffers: number of slabs, for the message.
        incremental: keep files that are much smaller than a piece whole, so that unchanged ones can be hard-linked.
        sidecars_nbytes: bytes of the files that are saved with it.

    Raises:
        MemoryBudgetError: not even a piece fits.
    """
    items = object_items(plan, blobs, align(plan.nbytes))
    layout = plan.layout.with_objects(items)
    documents = (
        align(len(plan.document)) + _ROW_BYTES * len(items) + _DOCUMENT_BYTES + _ROUNDING_BYTES + sidecars_nbytes
    )
    overhead = documents + _marks_nbytes(budget_nbytes)
    room = budget_nbytes - overhead  # in a slab, for a piece
    total = sum(file.nbytes for file in layout.files)
    num_parts = max(1, -(-total // max(1, room)))
    whole_bytes = max(0, room // _FILES_PER_PIECE) if incremental else 0
    while room >= layout.segment_bytes + BLOCK_BYTES:  # a piece of one segment may begin up to a block before it
        pieces = tuple(_pieces(layout, num_parts, whole_bytes))
        largest = max(piece.nbytes for piece in pieces)
        if largest <= room:
            return Pieces(
                plan=plan,
                blobs=blobs,
                pieces=pieces,
                items=tuple(items),
                plan_offset=align(largest),
                marks_offset=align(largest) + documents,
                slab_nbytes=align(largest) + overhead,
                whole_bytes=whole_bytes,
            )
        num_parts += max(1, num_parts // 8)
    raise MemoryBudgetError(
        f"the snapshot needs {total:,} bytes of host memory and would be staged in pieces, but a buffer of "
        f"{budget_nbytes:,} bytes (arena.max_host_bytes / arena.buffers) does not hold even one piece of "
        f"{layout.segment_bytes:,} bytes and the {overhead:,} bytes that describe it; raise arena.max_host_bytes to "
        f"{num_buffers * _smallest_slab(overhead)} or more"
    )


def _smallest_slab(overhead: int) -> int:
    """Return the bytes of a slab in which a segment, as :func:`segment_bytes_for` chooses it, has room beside the rest."""
    overhead += BLOCK_BYTES  # a piece may begin a block before its segment
    needed = overhead * _SEGMENTS_PER_PIECE // (_SEGMENTS_PER_PIECE - 1) + _MIN_SEGMENT_BYTES + 1
    return -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE


def _pieces(layout: Layout, num_parts: int, whole_bytes: int) -> Iterator[Piece]:
    for part, segments in enumerate(partition(layout, num_parts, whole_bytes)):
        ranges = [_in_slab(layout.items[segment.index], segment) for segment in segments]
        ranges = [(start, end) for start, end in ranges if start < end]
        if ranges:
            start = ranges[0][0]
            yield Piece(parts=range(part, part + 1), start=start - start % BLOCK_BYTES, end=ranges[-1][1])
        else:  # the part has headers or tails only
            yield Piece(parts=range(part, part + 1), start=0, end=0)


def _in_slab(item: Item, segment: Segment) -> tuple[int, int]:
    """Where a whole snapshot's slab has the raw bytes of a segment: (start, end)."""
    start = max(segment.start, item.data_offset)
    end = min(segment.end, item.data_offset + item.data_nbytes)
    return item.slab_offset + start - item.data_offset, item.slab_offset + end - item.data_offset


def copies_of(
    piece: Piece, plan: SnapshotPlan, leaves: Sequence[torch.Tensor]
) -> tuple[list[Copy], list[torch.Tensor]]:
    """Find the copies that fill a piece's slab, and temporary tensors to keep alive until they are done.

    A packed tensor of which only a part lies in the piece is first made contiguous as a whole, which takes memory for it.
    """
    copies: list[Copy] = []
    kept: list[torch.Tensor] = []
    first = bisect.bisect_right(plan.copies, piece.start, key=lambda c: c.slab_offset + c.nbytes)
    for copy in plan.copies[first:]:
        if copy.slab_offset >= piece.end:
            break
        start = max(copy.slab_offset, piece.start)
        nbytes = min(copy.slab_offset + copy.nbytes, piece.end) - start
        skipped = start - copy.slab_offset
        is_all = nbytes == copy.nbytes
        address, on_host = copy.address, copy.on_host
        if copy.is_packed and not is_all:
            tensor = leaves[copy.leaf].detach().resolve_conj().resolve_neg().cpu().contiguous()
            kept.append(tensor)
            address, on_host = tensor.data_ptr(), True
        address = address if address == PACKED else address + skipped
        copies.append(replace(copy, address=address, slab_offset=start - piece.start, nbytes=nbytes, on_host=on_host))
    return copies, kept


def blobs_of(piece: Piece, items: Sequence[Item], blobs: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Find the bytes of the pickled objects that lie in a piece: (offset in the piece's slab, bytes)."""
    for item, blob in zip(items, blobs, strict=True):
        start, end = max(item.slab_offset, piece.start), min(item.slab_offset + len(blob), piece.end)
        if start < end:
            yield start - piece.start, blob[start - item.slab_offset : end - item.slab_offset]
