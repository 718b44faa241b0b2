"""Where in the slab each tensor's bytes go, and what is copied to get them there.

Sources are seen as *extents*: stretches of one device's memory. A dense tensor is the stretch it covers; stretches that
overlap (tied weights, views, slices) become one extent and are copied once. A tensor whose elements do not tile a stretch
(expanded, a column of a matrix, a conjugate view) is packed: copied element by element into contiguous memory.

The slab's order is not the files' order: large extents come first and small ones together behind them, so that small ones
are copied many at a time (``batches.py``). Only a snapshot that is staged in pieces keeps to the files' order, because a
piece holds what one part of the files needs. A large tensor lies within a block of memory as it does within a block of its
file, so that the disk can take it from there (``stager.workers.checkpoint.storage.posix.direct_io``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from stager.state.copies import PACKED, SMALL_BYTES, Copies
from stager.state.tensor_table import TensorTable
from stager.workers.checkpoint.layout.layout import align
from stager.workers.checkpoint.storage.posix.direct_io import BLOCK_BYTES

LARGE_BYTES = 1 << 20  # from here on the place in the file counts


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tensors' bytes go in the slab.

    Attributes:
        copies: in slab order.
        offsets: for each row of the table, where its first byte is in the slab; an array.
        nbytes: bytes of the slab that the copies fill.
    """

    copies: Copies
    offsets: Any
    nbytes: int


def place(table: TensorTable, file_offsets: Any, is_packed: Any) -> Placement:
    """Place each byte of the sources once, large extents first.

    Args:
        file_offsets: for each row of the table, where its bytes go in a file, or -1; of large tensors only.
        is_packed: for each row, whether it is copied element by element.
    """
    nbytes = table.of_each(lambda kind: kind.nbytes)
    offsets = np.zeros(len(table), dtype=np.int64)
    rows = np.flatnonzero(~is_packed & (nbytes > 0))
    extents = _merge(table, rows, nbytes)
    is_small = extents.nbytes <= SMALL_BYTES
    # Small ones of one device stand together, so that they are gathered there: device_copies.py.
    order = np.lexsort((extents.leaf, np.where(is_small, extents.on, 0), is_small))
    places = np.zeros(len(order), dtype=np.int64)
    num_large = int(len(order) - is_small.sum())
    position = 0
    for extent in order[:num_large].tolist():
        first = int(extents.first[extent])
        position = _next(position, int(extents.start[extent]), int(file_offsets[first]), int(extents.itemsize[extent]))
        places[extent] = position
        position += int(extents.nbytes[extent])
    small = order[num_large:]
    if len(small):
        # Each keeps its address modulo 64, as in _next().
        shift = extents.start[small] % 64
        slots = -(-(shift + extents.nbytes[small]) // 64) * 64
        places[small] = align(position) + np.cumsum(slots) - slots + shift
        position = int(places[small[-1]] + extents.nbytes[small[-1]])
    offsets[rows] = places[extents.of_row] + table.addresses[rows] - extents.start[extents.of_row]
    copies = [(extents.leaf[order], extents.start[order], places[order], extents.nbytes[order])]
    on_host = [table.on_host[extents.first[order]]]
    packed: dict[Any, int] = {}
    rest = np.flatnonzero(is_packed & (nbytes > 0))
    itemsizes = table.of_each(lambda kind: kind.dtype.itemsize)
    made: list[tuple[int, int, int, int]] = []
    for row, identity in zip(rest.tolist(), table.identities(rest), strict=True):
        if identity not in packed:
            position = packed[identity] = _next(position, 0, int(file_offsets[row]), int(itemsizes[row]))
            made.append((row, PACKED, position, int(nbytes[row])))
            position += int(nbytes[row])
        offsets[row] = packed[identity]
    if made:
        numbers = np.array(made, dtype=np.int64)
        copies.append((table.leaves[numbers[:, 0]], numbers[:, 1], numbers[:, 2], numbers[:, 3]))
        on_host.append(table.on_host[numbers[:, 0]])
    leaf, address, place_of, length = (np.concatenate(parts) for parts in zip(*copies, strict=True))
    placed = Copies(leaf, address, place_of, length, np.concatenate(on_host), extents.shared)
    return Placement(placed, offsets, position)


def place_in_order(table: TensorTable, order: Any, file_offsets: Any, is_packed: Any) -> Placement:
    """Place rows' bytes in this order. Memory that several rows share is copied for each of them.

    Args:
        order: rows of the table, one for each tensor that is to be placed.
        file_offsets, is_packed: see :func:`place`.
    """
    nbytes, itemsizes = table.of_each(lambda kind: kind.nbytes), table.of_each(lambda kind: kind.dtype.itemsize)
    places: list[int] = []
    position = 0
    for count, file_offset, itemsize in zip(
        nbytes[order].tolist(), file_offsets[order].tolist(), itemsizes[order].tolist(), strict=True
    ):
        position = _next(position, 0, file_offset, itemsize)
        places.append(position)
        position += count
    offsets = np.zeros(len(table), dtype=np.int64)
    offsets[order] = places
    copied = order[nbytes[order] > 0]
    addresses = np.where(is_packed[copied], PACKED, table.addresses[copied])
    copies = Copies(table.leaves[copied], addresses, offsets[copied], nbytes[copied], table.on_host[copied])
    return Placement(copies, offsets, position)


def _next(position: int, address: int, file_offset: int, itemsize: int) -> int:
    """Find the next free place that lies within a block as ``file_offset`` does, if that keeps every view aligned.

    Otherwise find the next one that lies within 64 bytes as the address does. That keeps every view aligned, too, because
    the slab starts on a page.

    Args:
        file_offset: where the bytes go in a file; -1 if that does not matter.
        itemsize: of the largest elements.
    """
    if file_offset >= 0 and (file_offset - address) % itemsize == 0:
        return position + (file_offset - position) % BLOCK_BYTES
    return align(position) + address % 64


@dataclass(frozen=True, slots=True)
class _Extents:
    """Stretches of memory, in columns, by device and address.

    Attributes:
        start, nbytes: where, how long.
        on: number of the device.
        leaf: the first of the leaves that lie in it.
        first: the row that begins first.
        itemsize: of the largest elements in it.
        of_row: for each row that was given, the position of its extent.
        shared: by their first leaf, the leaves of extents that have several, in order.
    """

    start: Any
    nbytes: Any
    on: Any
    leaf: Any
    first: Any
    itemsize: Any
    of_row: Any
    shared: dict[int, tuple[int, ...]]


def _merge(table: TensorTable, rows: Any, nbytes: Any) -> _Extents:
    """Join overlapping stretches of one device's memory."""
    if not len(rows):
        nothing = np.zeros(0, dtype=np.int64)
        return _Extents(*(nothing,) * 7, {})
    # lexsort is stable: rows at one address keep their order.
    order = np.lexsort((table.addresses[rows], table.on[rows]))
    in_order = rows[order]
    start, on, leaves = table.addresses[in_order], table.on[in_order], table.leaves[in_order]
    end = start + nbytes[in_order]
    reached = end.copy()
    edges = [0, *(np.flatnonzero(np.diff(on)) + 1).tolist(), len(on)]
    for low, high in pairwise(edges):  # of each device
        reached[low:high] = np.maximum.accumulate(end[low:high])
    begins = np.ones(len(on), dtype=bool)
    begins[1:] = (start[1:] >= reached[:-1]) | (on[1:] != on[:-1])
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(on)) - 1
    of_row = np.empty(len(rows), dtype=np.int64)
    of_row[order] = np.cumsum(begins) - 1
    itemsizes = table.of_each(lambda kind: kind.dtype.itemsize)[in_order]
    leaf = np.minimum.reduceat(leaves, firsts)
    shared: dict[int, tuple[int, ...]] = {}
    for extent in np.flatnonzero(lasts > firsts).tolist():
        members = sorted(leaves[firsts[extent] : lasts[extent] + 1].tolist())
        shared[members[0]] = tuple(members)
    return _Extents(
        start=start[firsts],
        nbytes=reached[lasts] - start[firsts],
        on=on[firsts],
        leaf=leaf,
        first=in_order[firsts],
        itemsize=np.maximum.reduceat(itemsizes, firsts),
        of_row=of_row,
        shared=shared,
    )
