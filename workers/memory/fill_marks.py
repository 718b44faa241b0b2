"""How far a slab is filled, written down in the slab itself: the trainer sets marks, workers read only what is marked.

    | state | stretch 0 | stretch 1 | ... |     one byte each, behind everything else in the slab

    FILLING --everything is there--> WHOLE
       '------staging has failed---> ABANDONED

So the workers of a save begin before its snapshot is whole: they open files, and hash and write each stretch as soon as it
is marked. They sign nothing (no receipt, so no commit) before WHOLE.

NOTE [ A slab that is half filled ]
  * WHOLE is the moment at which a snapshot is safe: one byte, in memory that the workers have mapped. Its tasks are with the
    workers by then. What happens to the trainer afterwards does not matter.
  * A trainer that dies before it has never said that the snapshot was staged. Its workers give the task up, and remove the
    partial directory if no other rank writes there.
  * A trainer that lives and cannot finish (a tripwire, a failed copy, Ctrl-C) says ABANDONED, and the tasks fail at once.
    The slab is leased again only when they have ended.
  * A worker that dies meanwhile is replaced, and the task begins again: the marks are still there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from stager.workers.errors import AbandonedSnapshotError
from stager.workers.faults import point
from stager.workers.memory.attached import Memory

STRETCH_BYTES = 4 << 20  # as much as a worker hashes and writes at a time

_PAUSE_SECS = 0.0005  # a stretch takes about as long to fill
_LONGEST_PAUSE_SECS = 0.01


class FillState(IntEnum):
    """The first of the marks. Memory that was given back reads as zeros: nobody fills it."""

    ABANDONED = 0
    FILLING = 1
    WHOLE = 2


@dataclass(frozen=True, slots=True)
class FillMarks:
    """Where a slab has its marks, and who sets them.

    Attributes:
        offset: of the state in the slab.
        num_stretches: of ``STRETCH_BYTES`` each, from the slab's first byte on.
        filler_pid: the trainer, whose children the workers are.
    """

    offset: int
    num_stretches: int
    filler_pid: int

    @property
    def nbytes(self) -> int:
        """How many bytes the marks take."""
        return 1 + self.num_stretches


WHOLE_ALREADY = FillMarks(0, 0, 0)
"""The marks of memory that was whole before any task for it was made: a replica."""


def num_stretches(nbytes: int) -> int:
    """Return how many stretches ``nbytes`` bytes have."""
    return -(-nbytes // STRETCH_BYTES)


class FillWatch:
    """The marks as a worker sees them. It waits for what is not there yet.

    Args:
        slab: as this process maps it.
    """

    def __init__(self, slab: Memory, marks: FillMarks) -> None:
        self._pid = marks.filler_pid
        self._is_whole = marks.filler_pid == WHOLE_ALREADY.filler_pid
        self._state = slab.view[marks.offset : marks.offset + 1]
        self._stretches = slab.view[marks.offset + 1 : marks.offset + marks.nbytes]
        self._fence = threading.Lock()

    @property
    def is_whole(self) -> bool:
        """Whether everything is there: then there is nothing to wait for."""
        return self._is_whole

    def wait_for(self, start: int, end: int) -> None:
        """Return when the slab's bytes from ``start`` to ``end`` are there.

        Raises:
            AbandonedSnapshotError: they will never be.
        """
        if not self._is_whole:
            here = self._stretches[start // STRETCH_BYTES : num_stretches(end)]
            self._wait_until(lambda: all(here))

    def wait_until_whole(self) -> None:
        """Return when the whole snapshot is there, and was found good.

        Raises:
            AbandonedSnapshotError: it never will be.
        """
        if not self._is_whole:
            self._wait_until(lambda: False)

    def _wait_until(self, is_there: Callable[[], bool]) -> None:
        pause = _PAUSE_SECS
        while not is_there():
            # In this order: a trainer that said WHOLE and died right after it has said it.
            is_orphan = os.getppid() != self._pid
            state = self._state[0]
            if state == FillState.WHOLE:
                self._is_whole = True
                break
            if state == FillState.ABANDONED or is_orphan:
                raise AbandonedSnapshotError(is_orphan)
            point("part.waiting")
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)
        # A processor may read ahead of the mark. Taking a lock orders what is read after it behind it.
        with self._fence:
            pass
