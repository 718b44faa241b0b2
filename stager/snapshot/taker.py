"""Taking a snapshot: from the state to its plan, and from the sources into the slab.

Who copies what is decided here, once for as long as the plan, the guarded memory and the shared sources stay the same:

                    now: before save() returns          later: while training goes on
    the trainer     its threads (``copying.py``)        fewer threads, niced
    the workers     from sources in shared memory (``stager/sharing``), as ``staging.location`` says
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.ranks.partition import Partitioner
from stager.ranks.rank_group import RankGroup
from stager.sharing.sharer import SourceSharer
from stager.snapshot.batches import EMPTY, Batches, batch
from stager.snapshot.copying import Copier, compare
from stager.snapshot.device import SideStreams
from stager.snapshot.guard import Guard
from stager.snapshot.pieces import Piece, Pieces, copies_of
from stager.state.flatten import StateTree, flatten
from stager.state.placement import Copy
from stager.state.snapshot_plan import Planner, SnapshotPlan
from stager.telemetry.event import Timeline
from stager.workers.checkpoint.formats import Format
from stager.workers.errors import UnstageableError
from stager.workers.memory.slab import Slab

logger = logging.getLogger("stager")

_SAFE_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, list, tuple, set)
_CACHED_TYPES = (type(None), bool, int, str)  # hashable, and equal only when they are the same in every bit
_CACHED_BLOBS = 4096


@dataclass(slots=True)
class Snapshot:
    """A snapshot that is being taken. It keeps the sources alive until they are copied.

    Attributes:
        timeline: of the save; gets events and notes.
        tree: the state.
        blobs: the pickled objects, in the order of ``plan.objects``, and the format's trailer, if it has one.
        streams: order the copies from devices behind what the trainer's streams hold now.
    """

    timeline: Timeline
    tree: StateTree
    plan: SnapshotPlan
    blobs: list[bytes]
    streams: SideStreams

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and the pickled objects."""
        return self.plan.nbytes + sum(map(len, self.blobs))


@dataclass(frozen=True, slots=True)
class Assignment:
    """Copies, and who does them.

    Attributes:
        copies: all of them.
        by_trainer, by_workers: these copies, divided.
        kept: temporary tensors that copies read.
    """

    copies: tuple[Copy, ...] = ()
    by_trainer: Batches = EMPTY
    by_workers: tuple[Copy, ...] = ()
    kept: tuple[torch.Tensor, ...] = ()


class SnapshotTaker:
    """Plans snapshots and copies them into slabs.

    Args:
        file_format: how objects are pickled.
        copier: copies in this process.
        guard: what may be copied later.
        sharer: has workers copy, if any do.
        group: the ranks that make one checkpoint together.
        verify: compare each copy with its source.
    """

    def __init__(
        self,
        file_format: Format,
        copier: Copier,
        guard: Guard,
        sharer: SourceSharer,
        group: RankGroup,
        *,
        verify: bool,
    ) -> None:
        self._format = file_format
        self._copier = copier
        self._guard = guard
        self._sharer = sharer
        self._verify = verify
        self._group = group
        self._partitioner = Partitioner(self._group)
        self._shared_for: SnapshotPlan | None = None
        self._split: tuple[SnapshotPlan, list[bool], frozenset[int], Assignment, Assignment] | None = None
        self._blobs: dict[tuple[type, Any], bytes] = {}
        self._pickle_checked: set[type] = set()

    def flatten(self, state: Mapping[str, Any], occasion: str) -> StateTree:
        """Find the leaves that this rank writes.

        Args:
            state: as it is given to ``save()``.
            occasion: the save's id.

        Raises:
            UnstageableError: a state that cannot be saved.
            RankFailedError, InconsistentRanksError: see :class:`stager.ranks.partition.Partitioner`.
        """
        return self._partitioner.take(flatten(state, self._group.own_rank), occasion)

    def begin(self, timeline: Timeline, tree: StateTree, planner: Planner, *, may_move: bool | None = None) -> Snapshot:
        """Plan and pickle; nothing is copied yet.

        Args:
            timeline: of the save.
            tree: this rank's leaves.
            planner: makes the plan, or has it from the save before.
            may_move: whether sources may be moved into shared memory now, because no snapshot is being taken. None: do
                not look for sources that workers could copy.

        Raises:
            UnstageableError: a value cannot be saved; names its key path.
        """
        plan = planner.plan(tree)
        if may_move is not None and plan is not self._shared_for:
            if self._sharer.share(tree.leaves, may_move):
                plan = planner.plan(tree)  # what was moved has another address now
            self._shared_for = plan if may_move else None
        blobs = plan.with_trailer([self._pickle(tree, leaf) for leaf in plan.objects])
        return Snapshot(timeline, tree, plan, blobs, SideStreams(set(plan.devices or ())))

    def notes(self, snapshot: Snapshot) -> Sequence[str]:
        """Say which large tensors the trainer copies although workers were to, and why."""
        return self._sharer.notes(snapshot.tree.name)

    def split(self, snapshot: Snapshot, pieces: Pieces, piece: Piece) -> tuple[Assignment, Assignment]:
        """Decide which copies of a piece must be done now, and which may wait.

        Copies may wait only if they are guarded, and if the snapshot is one piece: otherwise its slab is needed again
        before ``save()`` returns. See NOTE [ Overlap is safe by construction ].
        """
        plan, leaves = snapshot.plan, snapshot.tree.leaves
        if not pieces.is_whole:
            of_piece, kept = copies_of(piece, plan, leaves)
            return Assignment(tuple(of_piece), batch(of_piece), (), tuple(kept)), Assignment()
        protected = self._guard.protects(plan) if self._guard else []
        sources = self._sharer.live_sources()
        if self._split is not None and self._split[0] is plan and self._split[1:3] == (protected, sources):
            return self._split[3:]
        may_wait = {leaf for leaf, is_protected in zip(plan.leaves, protected, strict=False) if is_protected}
        later = [copy for copy in plan.copies if may_wait.issuperset(copy.leaves)]
        now = [copy for copy in plan.copies if not may_wait.issuperset(copy.leaves)]
        both = self._assign(now, leaves, guarded=False), self._assign(later, leaves, guarded=True)
        self._split = (plan, protected, sources, *both)
        return both

    def _assign(self, copies: list[Copy], leaves: Sequence[Any], *, guarded: bool) -> Assignment:
        by_trainer, by_workers = self._sharer.split(copies, leaves, guarded=guarded)
        return Assignment(tuple(copies), batch(by_trainer), tuple(by_workers))

    def copy(self, snapshot: Snapshot, work: Assignment, slab: Slab, *, cold: bool, background: bool) -> None:
        """Copy into a slab; returns when every byte is there.

        Args:
            cold: pages of the slab may not be allocated yet.
            background: the trainer does not wait for it.

        Raises:
            TornSnapshotError: ``staging.verify`` is set, and something wrote to the sources meanwhile.
        """
        timeline, leaves = snapshot.timeline, snapshot.tree.leaves

        def copy_here(batches: Batches) -> None:
            self._copier.copy(batches, leaves, slab, snapshot.streams, cold=cold, background=background)

        with timeline.timed("stage"):
            if work.by_workers:
                meanwhile = work.by_trainer.copies
                copied = self._sharer.copy(
                    work.by_workers,
                    slab,
                    lambda copies: copy_here(work.by_trainer if tuple(copies) == meanwhile else batch(copies)),
                    meanwhile,
                )
                for result in copied.results:
                    timeline.event("stage", result.started, result.ended, f"worker {result.pid}")
                for note in copied.notes:
                    timeline.note(note)
            else:
                copy_here(work.by_trainer)
        if self._verify:
            with timeline.timed("verify"):
                compare(work.copies, leaves, slab, snapshot.tree.name)

    def forget(self) -> None:
        """Drop what was kept for the next save."""
        self._split = self._shared_for = None
        self._partitioner.forget()
        self._blobs.clear()

    def _pickle(self, tree: StateTree, leaf: int) -> bytes:
        value = tree.leaves[leaf]
        kind = type(value)
        if kind in _CACHED_TYPES and (blob := self._blobs.get((kind, value))) is not None:
            return blob
        try:
            blob = self._format.object_blob(value, leaf)
        except Exception as error:
            raise UnstageableError(tree.name(leaf), f"{kind.__name__} cannot be pickled: {error}") from error
        if kind in _CACHED_TYPES and len(self._blobs) < _CACHED_BLOBS:
            self._blobs[kind, value] = blob
        if kind not in _SAFE_TYPES and kind not in self._pickle_checked:
            self._pickle_checked.add(kind)
            _warn_if_unsafe(tree.name(leaf), kind, blob)
        return blob


def _warn_if_unsafe(name: str, kind: type, blob: bytes) -> None:
    """Say at save time, not weeks later, that loading this will need permission."""
    try:
        torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001  (torch raises several types; each means that it is refused)
        logger.warning(
            "%s holds a %s.%s, which is pickled; loading it will need allow_pickle=True (%s)",
            name,
            kind.__module__,
            kind.__qualname__,
            str(error).splitlines()[0],
        )
