"""Snapshots as a save takes them: share, plan, split, copy; and the comparison with their source."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.sharing.worker_copy import Copied
from stager.state.copies import Copy
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.state.state_tree import StateTree
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.structure import describe
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import WorkerPool

MIB = 1 << 20


@dataclass
class Taken:
    """A snapshot: who was to copy what, and who did.

    Attributes:
        for_workers: the tensors that the workers were asked for.
        by_trainer: bytes that the trainer copied in the end.
    """

    slab: Slab
    copies: tuple[Copy, ...]
    for_workers: set[str]
    by_trainer: int
    copied: Copied
    notes: tuple[str, ...]

    def equals_source(self) -> bool:
        """Only while the source lives, and is as it was."""
        return all(
            ctypes.string_at(c.address, c.nbytes) == bytes(self.slab.view[c.slab_offset : c.slab_offset + c.nbytes])
            for c in self.copies
        )


class Snapshots:
    """Takes snapshots of states of dense CPU tensors."""

    def __init__(self, pool: WorkerPool, location: Any = "workers", **options: Any) -> None:
        self.options = SharingOptions(location, **{"min_bytes": 64 << 10, **options})
        self.sharer = SourceSharer(pool, 2, self.options)
        self.by_trainer = 0

    def take(self, state: Mapping[str, Any], *, guarded: bool = True, slab: Slab | None = None) -> Taken:
        flat = flatten(state)
        self.sharer.share(flat.leaves, may_move=True)
        plan = Planner(get_format("dcp"), 1, 64 << 20).plan(flat)
        mine, theirs = self.sharer.split(plan.copies, flat.leaves, guarded=guarded)
        assert sorted([*mine, *theirs], key=lambda copy: copy.leaf) == sorted(plan.copies, key=lambda copy: copy.leaf)
        slab = slab or Slab.create(plan.nbytes)
        self.by_trainer = 0
        copied = self.sharer.copy(
            theirs, slab, lambda copies: self._copy_here(copies, slab), lambda: self._copy_here(mine, slab)
        )
        names = {_name(flat, copy.leaf) for copy in theirs}
        notes = self.sharer.notes(lambda leaf: _name(flat, leaf))
        return Taken(slab, tuple(plan.copies), names, self.by_trainer, copied, notes)

    def _copy_here(self, copies: Sequence[Copy], slab: Slab) -> None:
        for copy in copies:
            ctypes.memmove(slab.address + copy.slab_offset, copy.address, copy.nbytes)
            self.by_trainer += copy.nbytes


def _name(flat: StateTree, leaf: int) -> str:
    return describe(flat.paths[leaf])


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
