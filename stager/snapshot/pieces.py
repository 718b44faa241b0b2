"""A snapshot that is larger than the memory for it: staged and written piece by piece.

The checkpoint is dealt into more parts than there are workers, so small that the data of one fits a buffer. Each part is
copied into a slab of its own and handed over; the slab is used again when its part is written. What is on disk, and what a
crash leaves, is the same as ever: receipts of parts, and one commit when all are there. The state must not change until
the last piece is copied, so ``save()`` waits for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stager.snapshot.slab_writer import object_items
from stager.state.placement import Copy
from stager.state.snapshot_plan import SnapshotPlan
from stager.workers.checkpoint.layout.layout import Item, Layout, Segment, align, partition
from stager.workers.checkpoint.write.direct_io import BLOCK_BYTES
from stager.workers.errors import MemoryBudgetError

_MIN_SEGMENT_BYTES = 64 << 10
_SEGMENTS_PER_PIECE = 8  # parts are cut between segments, so these bound how unequal they are
_FILES_PER_PIECE = 4  # the same for files that are not to be cut


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of the save, and the stretch of a whole snapshot's slab that it needs: ``start`` to ``end``, bytes."""

    part: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Pieces:
    """Attributes:
    pieces: in order of their parts.
    items: the objects' places.
    slab_nbytes: what a slab for any of them needs.
    whole_bytes: files up to this size are in one piece (:func:`stager.workers.checkpoint.layout.layout.partition`).
    """

    pieces: tuple[Piece, ...]
    items: tuple[Item, ...]
    slab_nbytes: int
    whole_bytes: int


def segment_bytes_for(budget_nbytes: int, configured: int) -> int:
    """Segments small enough to cut a snapshot into pieces of ``budget_nbytes`` bytes."""
    return max(_MIN_SEGMENT_BYTES, min(configured, budget_nbytes // _SEGMENTS_PER_PIECE))


def cut(plan: SnapshotPlan, blobs: Sequence[bytes], budget_nbytes: int, *, incremental: bool = False) -> Pieces:
    """
    Args:
        plan: made in the files' order.
        budget_nbytes: for one slab.
        incremental: do not cut files that are small beside a piece, so that they can be linked.

    Raises:
        MemoryBudgetError: not even a piece fits.
    """
    items = object_items(plan, blobs, align(plan.nbytes))
    layout = plan.layout.with_objects(items)
    overhead = align(len(plan.document)) + 256 * len(items) + 8192
    room = budget_nbytes - overhead
    total = sum(file.nbytes for file in layout.files)
    num_parts = max(1, -(-total // max(1, room)))
    whole_bytes = max(0, room // _FILES_PER_PIECE) if incremental else 0
    while room > layout.segment_bytes:
        pieces = tuple(_pieces(layout, num_parts, whole_bytes))
        largest = max(piece.nbytes for piece in pieces)
        if largest <= room:
            return Pieces(pieces, tuple(items), align(largest) + overhead, whole_bytes)
        num_parts += max(1, num_parts // 8)
    raise MemoryBudgetError(
        f"the snapshot needs {total:,} bytes of host memory and would be staged in pieces, but a buffer of "
        f"{budget_nbytes:,} bytes (arena.max_host_bytes / arena.buffers) does not hold even one piece of "
        f"{layout.segment_bytes:,} bytes and the {overhead:,} bytes that describe it; raise arena.max_host_bytes"
    )


def _pieces(layout: Layout, num_parts: int, whole_bytes: int) -> Iterator[Piece]:
    for part, segments in enumerate(partition(layout, num_parts, whole_bytes)):
        ranges = [_in_slab(layout.items[segment.index], segment) for segment in segments]
        ranges = [(start, end) for start, end in ranges if start < end]
        if ranges:
            start = ranges[0][0]
            yield Piece(part, start - start % BLOCK_BYTES, ranges[-1][1])
        else:
            yield Piece(part, 0, 0)


def _in_slab(item: Item, segment: Segment) -> tuple[int, int]:
    """The raw bytes in a segment: where a whole snapshot's slab has them."""
    start = max(segment.start, item.data_offset)
    end = min(segment.end, item.data_offset + item.data_nbytes)
    return item.slab_offset + start - item.data_offset, item.slab_offset + end - item.data_offset


def copies_of(
    piece: Piece, plan: SnapshotPlan, leaves: Sequence[torch.Tensor]
) -> tuple[list[Copy], list[torch.Tensor]]:
    """What to copy for a piece, to where it is in the piece's slab; and temporary tensors to keep until it is done.

    A packed tensor that does not lie in one piece is made contiguous first, as a whole: that takes memory for it.
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
        whole = nbytes == copy.nbytes
        address, on_host = copy.address, copy.on_host
        if address < 0 and not whole:
            tensor = leaves[copy.leaf].detach().resolve_conj().resolve_neg().cpu().contiguous()
            kept.append(tensor)
            address, on_host = tensor.data_ptr(), True
        address = address + skipped if address >= 0 else address
        copies.append(replace(copy, address=address, slab_offset=start - piece.start, nbytes=nbytes, on_host=on_host))
    return copies, kept


def blobs_of(piece: Piece, items: Sequence[Item], blobs: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset in the piece's slab, bytes) of what of the pickled objects lies in a piece."""
    for item, blob in zip(items, blobs, strict=True):
        start, end = max(item.slab_offset, piece.start), min(item.slab_offset + len(blob), piece.end)
        if start < end:
            yield start - piece.start, blob[start - item.slab_offset : end - item.slab_offset]
