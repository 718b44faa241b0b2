"""Marking in a slab what is there, while it is filled. See ``workers/memory/fill_marks.py``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from stager.snapshot.batches import Batches
from stager.workers.faults import point
from stager.workers.memory.fill_marks import STRETCH_BYTES, FillMarks, FillState, num_stretches
from stager.workers.memory.slab import Slab

Ranges = list[tuple[int, int]]
"""Ranges of bytes of a slab: (offset, number of bytes)."""


def ranges_of(batches: Batches) -> Ranges:
    """Return what a copier will write, each range as it is told to :meth:`Filling.wrote`."""
    works = (*batches.on_host, *batches.others)
    return [(work.slab_offset, work.nbytes) for work in works]


class Filling:
    """A slab that is being filled. Every method may be called from any thread.

    Args:
        slab: leased; no worker reads it yet.
        offset: where in the slab the marks are.
        nbytes: what they are about: so many bytes from the slab's first one on.
        ranges: all that will be written; each has to be told to :meth:`wrote`. What none of them touches counts as there.

    Attributes:
        marks: what workers need to know of them.
    """

    def __init__(self, slab: Slab, offset: int, nbytes: int, ranges: Iterable[tuple[int, int]]) -> None:
        marks = self.marks = FillMarks(offset, num_stretches(nbytes), os.getpid())
        self._slab = slab
        self._state = FillState.FILLING
        self._lock = threading.Lock()
        self._missing = _counts(list(ranges), marks.num_stretches)  # ranges that are not there yet, of each stretch
        here = np.zeros(marks.nbytes, dtype=np.uint8)
        here[0] = self._state
        here[1:] = self._missing == 0
        slab.view[marks.offset : marks.offset + marks.nbytes] = here.data

    def wrote(self, offset: int, nbytes: int) -> None:
        """Mark what became whole by this range, whose every byte is in the slab."""
        first, end = offset // STRETCH_BYTES, num_stretches(offset + nbytes)
        with self._lock:  # it also orders the bytes of the range before their marks
            if self._state is not FillState.FILLING:  # the slab may be another save's by now
                return
            self._missing[first:end] -= 1
            for stretch in np.flatnonzero(self._missing[first:end] == 0).tolist():
                self._slab.view[self.marks.offset + 1 + first + stretch] = 1
        point("save.filled")

    def end(self, state: FillState) -> None:
        """Say that the snapshot is whole, or that it never will be. Only the first call counts."""
        with self._lock:
            if self._state is FillState.FILLING:
                self._state = state
                self._slab.view[self.marks.offset] = int(state)


def _counts(ranges: list[tuple[int, int]], num: int) -> Any:
    """Count for each of ``num`` stretches how many ranges touch it."""
    edges = np.zeros(num + 1, dtype=np.int64)
    if ranges:
        offsets, sizes = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        np.add.at(edges, offsets // STRETCH_BYTES, 1)
        np.add.at(edges, -(-(offsets + sizes) // STRETCH_BYTES), -1)
    return np.cumsum(edges)[:num]
