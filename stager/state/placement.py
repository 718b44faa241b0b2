"""Where in the slab each tensor's bytes go, and what is copied to get them there.

Sources are seen as *extents*: stretches of one device's memory. A dense tensor is the stretch it covers; stretches that
overlap (tied weights, views, slices) become one extent and are copied once. A tensor whose elements do not tile a stretch
(expanded, a column of a matrix, a conjugate view) is packed: copied element by element into contiguous memory.

The slab's order is not the files' order: large extents come first and small ones together behind them, so that small ones
are copied many at a time (``batches.py``). Only a snapshot that is staged in pieces keeps to the files' order, because a
piece holds what one part of the files needs. A large tensor lies within a block of memory as it does within a block of its
file, so that the disk can take it from there (``stager.workers.checkpoint.write.direct_io``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stager.state.fingerprint import Fingerprint
from stager.workers.checkpoint.layout.layout import align
from stager.workers.checkpoint.layout.layout import is_dense as is_dense_stride
from stager.workers.checkpoint.write.direct_io import BLOCK_BYTES

LARGE_BYTES = 1 << 20  # from here on the place in the file counts
SMALL_BYTES = 64 << 10  # up to here many in one system call is faster than a memmove for each

PACKED = -1  # in the place of an address

Row = tuple[int, Fingerprint]
"""A leaf and its fingerprint."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One stretch of memory to copy.

    Attributes:
        leaf: number of a leaf whose tensor owns the memory. The next save finds the memory through the same leaf.
        address: of the first byte, on the tensor's device; ``PACKED``: see :attr:`is_packed`.
        slab_offset, nbytes: where to, how much.
        leaves: numbers of all leaves that lie in it.
        on_host: whether the address can be read by the CPU.
    """

    leaf: int
    address: int
    slab_offset: int
    nbytes: int
    leaves: tuple[int, ...]
    on_host: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether it is copied element by element, because its tensor is no stretch of memory."""
        return self.address == PACKED


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tensors' bytes go in the slab.

    Attributes:
        copies: in slab order.
        offsets: by leaf, where its first byte is in the slab.
        nbytes: bytes of the slab that the copies fill.
    """

    copies: tuple[Copy, ...]
    offsets: dict[int, int]
    nbytes: int


@dataclass(slots=True)
class _Extent:
    start: int
    end: int
    rows: list[Row]
    leaves: tuple[int, ...] = ()


def place(rows: Sequence[Row], file_offsets: Mapping[int, int]) -> Placement:
    """Place each byte of the sources once, large extents first.

    Args:
        file_offsets: by leaf, where its bytes go in a file; of large tensors only.
    """
    extents = _merge([row for row in rows if is_dense(row[1]) and row[1].nbytes])
    copies: list[Copy] = []
    offsets = {leaf: 0 for leaf, p in rows if not p.nbytes}
    position = 0
    for extent in extents:
        extent.leaves = tuple(sorted(leaf for leaf, _ in extent.rows)) if extent.rows[1:] else (extent.rows[0][0],)
    # Small ones of one device stand together, so that they are gathered there: device_copies.py.
    devices = {device: number for number, device in enumerate(sorted({p.device for _, p in rows}, key=str))}

    def order(extent: _Extent) -> tuple[bool, int, int]:
        is_small = extent.end - extent.start <= SMALL_BYTES
        return is_small, devices[extent.rows[0][1].device] if is_small else 0, extent.leaves[0]

    for extent in sorted(extents, key=order):
        nbytes = extent.end - extent.start
        position = _next(position, extent.start, file_offsets.get(extent.rows[0][0]), extent.rows)
        for leaf, p in extent.rows:
            offsets[leaf] = position + p.address - extent.start
        on_host = extent.rows[0][1].device.type == "cpu"
        copies.append(Copy(extent.leaves[0], extent.start, position, nbytes, extent.leaves, on_host))
        position += nbytes
    packed: dict[Fingerprint, int] = {}
    for leaf, p in rows:
        if is_dense(p) or not p.nbytes:
            continue
        if p not in packed:
            position = packed[p] = _next(position, 0, file_offsets.get(leaf), [(leaf, p)])
            copies.append(Copy(leaf, PACKED, position, p.nbytes, (leaf,), p.device.type == "cpu"))
            position += p.nbytes
        offsets[leaf] = packed[p]
    return Placement(tuple(copies), offsets, position)


def place_in_order(rows: Sequence[Row], file_offsets: Mapping[int, int]) -> Placement:
    """Place each row's bytes in this order. Memory that several rows share is copied for each of them."""
    copies: list[Copy] = []
    offsets: dict[int, int] = {}
    position = 0
    for leaf, p in rows:
        position = offsets[leaf] = _next(position, 0, file_offsets.get(leaf), [(leaf, p)])
        if p.nbytes:
            address = p.address if is_dense(p) else PACKED
            copies.append(Copy(leaf, address, position, p.nbytes, (leaf,), p.device.type == "cpu"))
        position += p.nbytes
    return Placement(tuple(copies), offsets, position)


def _next(position: int, address: int, file_offset: int | None, rows: Sequence[Row]) -> int:
    """Find the next free place that lies within a block as ``file_offset`` does, if that keeps every view aligned.

    Otherwise find the next one that lies within 64 bytes as the address does. That keeps every view aligned, too, because
    the slab starts on a page.
    """
    if file_offset is not None and (file_offset - address) % max(p.dtype.itemsize for _, p in rows) == 0:
        return position + (file_offset - position) % BLOCK_BYTES
    return align(position) + address % 64


def _merge(rows: list[Row]) -> list[_Extent]:
    """Join overlapping stretches of one device's memory."""
    extents: list[_Extent] = []
    last_device: torch.device | None = None
    for row in sorted(rows, key=lambda row: (str(row[1].device), row[1].address)):
        p = row[1]
        start, end = p.address, p.address + p.nbytes
        if extents and p.device == last_device and start < extents[-1].end:
            extents[-1].end = max(extents[-1].end, end)
            extents[-1].rows.append(row)
        else:
            extents.append(_Extent(start, end, [row]))
        last_device = p.device
    return extents


def is_dense(p: Fingerprint) -> bool:
    """Whether the tensor's bytes are exactly one stretch of memory, and mean what they say."""
    return not p.is_lazy and is_dense_stride(p.shape, p.stride)


def span_nbytes(p: Fingerprint) -> int:
    """Count the bytes from a tensor's first byte to its last."""
    if not p.nbytes:
        return 0
    reach = sum((length - 1) * step for length, step in zip(p.shape, p.stride, strict=True))
    return (reach + 1) * p.dtype.itemsize
