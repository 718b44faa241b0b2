"""Memory for the snapshots to come, allocated in the background as soon as their size is known, or can be guessed.

known     a state was saved, warmed up for, or loaded
guessed   from the optimizers that are guarded, and from the newest checkpoint in the directory
"""

from __future__ import annotations

from collections.abc import Callable

from stager.arena.arena import Arena
from stager.ranks.rank_group import RankGroup
from stager.snapshot.guard import Guard

_WORTH_PREPARING_BYTES = 16 << 20  # smaller slabs take milliseconds to allocate


class ExpectedMemory:
    """Prepares slabs for this rank's part of the state.

    Args:
        newest_nbytes: returns about how many bytes the newest checkpoint has; 0: nobody knows.
        guard: knows the optimizers.
    """

    def __init__(self, arena: Arena, newest_nbytes: Callable[[], int], guard: Guard, group: RankGroup) -> None:
        self._arena = arena
        self._newest_nbytes = newest_nbytes
        self._guard = guard
        self._num_ranks = group.num_ranks
        self._knows_size = False

    def know_size(self) -> None:
        """Guess no more: the size of the state is known."""
        self._knows_size = True

    def expect_loaded(self, nbytes: int) -> None:
        """Prepare for a state of about ``nbytes`` bytes, of all ranks together, which was loaded and so will be saved."""
        self.know_size()
        self._prepare(nbytes // self._num_ranks)

    def expect_what_is_guarded(self) -> None:
        """Prepare for what the guarded optimizers will hold."""
        if not self._knows_size:
            self._prepare(self._guard.expected_nbytes(self._num_ranks) or 0)

    def expect_the_last_runs(self) -> None:
        """Prepare for a state as large as the newest checkpoint that is there: the program most likely goes on from it."""
        nbytes = self._newest_nbytes() // self._num_ranks
        if not self._knows_size:
            self._prepare(nbytes)

    def _prepare(self, nbytes: int) -> None:
        if nbytes < _WORTH_PREPARING_BYTES:
            return
        nbytes += nbytes // 64 + (1 << 20)  # what describes the tensors comes on top; a slab may be larger than needed
        if nbytes <= self._arena.max_slab_nbytes:
            self._arena.prepare_in_background(nbytes, is_guess=True)
