"""Copies sorted by how they are best done, with everything computed ahead that a later save can use again.

large, in host memory   memmove, in pieces that several threads share; one core reaches about twice what
                        ``Tensor.copy_`` does on it (10 and 5.7 GB/s on a 2-core Xeon), because it bypasses the cache
small, in host memory   many in one ``pwritev`` into the slab's memfd: 20,000 of 1 KiB took 6 ms, where memmove one by
                        one took 15 ms and ``torch._foreach_copy_`` 15 ms; and the GIL is taken once per 1,024
                        copies, not once per copy, which counts in a thread beside a busy trainer
all, in the background  the kernel copies large ones, too: see ``kernel_copies.py``
all others              device memory and packed copies: by torch
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from stager.state.copies import NO_COPIES, SMALL_BYTES, Copies, Copy
from stager.workers.checkpoint.storage.posix.files import IOV_MAX

PIECE_BYTES = 16 << 20
_MAX_GAP_BYTES = 64  # alignment leaves less than that between small copies

_zeros = ctypes.create_string_buffer(_MAX_GAP_BYTES)
_zeros_address = ctypes.addressof(_zeros)


@dataclass(frozen=True, slots=True)
class Move:
    """One stretch."""

    address: int
    slab_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gather:
    """One ``pwritev``. ``vectors`` is an array of (address, nbytes) pairs, which the kernel takes as ``struct iovec``."""

    vectors: Any
    slab_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Batches:
    """Copies, batched.

    Attributes:
        copies: all of them.
        on_host: what threads do, in any order.
        others: from device memory, and packed ones.
    """

    copies: Copies
    on_host: tuple[Move | Gather, ...]
    others: tuple[Copy, ...]


EMPTY = Batches(NO_COPIES, (), ())


def batch(copies: Sequence[Copy], num_parts: int = 1) -> Batches:
    """Group copies by how they are done: large ones in host memory, small ones in host memory, all others.

    Args:
        copies: in slab order, not overlapping.
        num_parts: so many workers wait for the bytes, each for another stretch of the slab: they are filled in turn.
    """
    copies = Copies.of(copies)
    by_address = copies.on_host & ~copies.is_packed
    is_small = copies.nbytes <= SMALL_BYTES
    small, large = copies.where(by_address & is_small), copies.where(by_address & ~is_small)
    # Small ones first: they lie between the large ones in the files, so that every worker needs some of them.
    on_host: tuple[Move | Gather, ...] = (*_gathers(small), *_in_turn(list(_moves(large)), num_parts))
    return Batches(copies, on_host, tuple(copies.where(~by_address)))


def _moves(copies: Copies) -> Iterator[Move]:
    columns = (copies.address.tolist(), copies.slab_offset.tolist(), copies.nbytes.tolist())
    for address, slab_offset, total in zip(*columns, strict=True):
        for start in range(0, total, PIECE_BYTES):
            yield Move(address + start, slab_offset + start, min(PIECE_BYTES, total - start))


def _in_turn(moves: list[Move], num_parts: int) -> Iterator[Move]:
    """Divide moves into ``num_parts`` runs of about as many bytes, and take the next one of each run in turn."""
    length = -(-len(moves) // num_parts)
    runs = [moves[start : start + length] for start in range(0, len(moves), max(1, length))]
    for of_each in zip_longest(*runs):
        yield from (move for move in of_each if move is not None)


def _gathers(copies: Copies) -> Iterator[Gather]:
    """Runs of copies that lie next to each other in the slab; the gaps between them are filled with zeros."""
    if not len(copies):
        return
    ends = copies.slab_offset + copies.nbytes
    gaps = np.zeros(len(copies), dtype=np.int64)  # before each
    gaps[1:] = copies.slab_offset[1:] - ends[:-1]
    apart = np.flatnonzero((gaps < 0) | (gaps >= _MAX_GAP_BYTES)).tolist()
    # Two vectors for each copy: the gap before it, then the copy. A gap of no bytes has no vector.
    vectors = np.empty((len(copies), 2, 2), dtype=np.uint64)
    vectors[:, 0, 0], vectors[:, 0, 1] = _zeros_address, gaps.clip(0)
    vectors[:, 1, 0], vectors[:, 1, 1] = copies.address, copies.nbytes
    used = np.ones((len(copies), 2), dtype=bool)
    used[:, 0] = gaps > 0
    counts = np.cumsum(used.sum(axis=1))
    vectors = vectors[used]
    for start, end in pairwise([0, *apart, len(copies)]):
        first = start
        while first < end:
            # As many as one call takes, and not much more than PIECE_BYTES.
            skipped = int(counts[first]) - 1  # the vectors before this copy, and its gap
            most = int(np.searchsorted(counts, skipped + IOV_MAX, side="right"))
            full = int(np.searchsorted(ends, int(copies.slab_offset[first]) + PIECE_BYTES)) + 1
            last = min(end, most, max(full, first + 1))
            offset = int(copies.slab_offset[first])
            yield Gather(vectors[skipped : int(counts[last - 1])], offset, int(ends[last - 1]) - offset)
            first = last
