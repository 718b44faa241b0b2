"""Taking a snapshot: from the state to its plan, and from the sources into the slab.

Who copies what is decided here, once for as long as the plan, the guarded memory and the shared sources stay the same:

                    now: before save() returns          later: while training goes on
    the trainer     its threads (``copying.py``)        fewer threads, niced
    the workers     from sources in shared memory (``stager/sharing``), as ``staging.location`` says
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch

from stager.ranks.partition import Partitioner
from stager.ranks.rank_group import RankGroup
from stager.sharing.sharer import SourceSharer
from stager.snapshot.batches import EMPTY, Batches, batch
from stager.snapshot.copying import MOST_NAMES, Copier, Wrote, compare, tell_nobody
from stager.snapshot.filling import Ranges, ranges_of
from stager.snapshot.guard import Guard
from stager.snapshot.held_sources import HeldSources
from stager.snapshot.kernel_copies import MemoryGoneError
from stager.snapshot.object_pickler import ObjectPickler
from stager.snapshot.pieces import Piece, Pieces, copies_of
from stager.snapshot.tripwires import Armed, Place, Wires
from stager.state.copies import NO_COPIES, Copies, Copy
from stager.state.fingerprint import TensorMemory
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner, SnapshotPlan
from stager.state.state_tree import StateTree
from stager.telemetry.timeline import Timeline
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.formats.torch_settings import real_tensors
from stager.workers.device.streams import SideStreams
from stager.workers.errors import TornSnapshotError
from stager.workers.memory.slab import Slab
from stager.workers.wording import first_of

logger = logging.getLogger("stager")


@dataclass(slots=True)
class Snapshot:
    """A snapshot that is being taken. It keeps the sources alive until they are copied.

    Attributes:
        timeline: of the save; gets events and notes.
        tree: the state.
        blobs: the pickled objects, in the order of ``plan.objects``, and the format's trailer, if it has one.
        streams: order the copies from devices behind what the trainer's streams hold now.
        guarded: what the tripwires will watch beside the leaves that are copied then, until they are set: the other
            tensors of the guarded optimizers.
        memory: of the tensors, until the tripwires are set.
        armed: tripwires of the copies that are made then; they hold the memory.
    """

    timeline: Timeline
    tree: StateTree
    plan: SnapshotPlan
    blobs: list[bytes]
    streams: SideStreams
    memory: TensorMemory
    guarded: Sequence[torch.Tensor] = ()
    armed: Armed | None = None

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

    copies: Copies = NO_COPIES
    by_trainer: Batches = EMPTY
    by_workers: tuple[Copy, ...] = ()
    kept: tuple[torch.Tensor, ...] = ()

    @property
    def ranges(self) -> Ranges:
        """Where in the slab the trainer's copies go."""
        return ranges_of(self.by_trainer)


class _SplitKey(NamedTuple):
    """What the division of a plan's copies depends on.

    ``protected``, ``is_own``: for each leaf of ``plan.leaves``, whether its copy may wait, and whether it is a tensor of a
    guarded optimizer. ``live_sources``: ids of the shared sources.
    """

    protected: list[bool]
    is_own: list[bool]
    live_sources: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Split:
    """How the copies of a snapshot were divided, and what that depends on.

    Attributes:
        own_now: numbers of the leaves that are an optimizer's tensors, and are copied at once all the same.
    """

    plan: SnapshotPlan
    key: _SplitKey
    now: Assignment
    later: Assignment
    own_now: tuple[int, ...]


class SnapshotTaker:
    """Plans snapshots and copies them into slabs.

    Args:
        file_format: how objects are pickled.
        copier: copies in this process.
        guard: what may be copied later.
        sharer: has workers copy, if any do.
        group: the ranks that make one checkpoint together.
        num_parts: into how many parts a save in one piece is divided.
        verify: compare each copy with its source.
        safe_globals: classes that loading will allow, beside plain data; None: it will allow all.
        differing: see :class:`stager.ranks.agreement.Agreement`.
    """

    def __init__(
        self,
        file_format: Format,
        copier: Copier,
        guard: Guard,
        sharer: SourceSharer,
        group: RankGroup,
        num_parts: int,
        *,
        verify: bool,
        safe_globals: Sequence[str] | None = (),
        differing: str = "error",
    ) -> None:
        self._format = file_format
        self._copier = copier
        self._guard = guard
        self._sharer = sharer
        self._verify = verify
        self._group = group
        self._num_parts = num_parts
        self._partitioner = Partitioner(self._group, differing, has_chunks=file_format.has_chunks)
        self._shared_for: SnapshotPlan | None = None
        self._split: _Split | None = None
        self._wires = Wires.of((), TensorMemory())  # the tripwires of the copies that the last split makes later
        self._torn: frozenset[str] = frozenset()  # names of tensors that somebody else wrote to, once
        self._pickler = ObjectPickler(file_format, safe_globals)

    def flatten(self, state: Mapping[str, Any], occasion: str) -> StateTree:
        """Find the leaves that this rank writes.

        Args:
            state: as it is given to ``save()``.
            occasion: the save's id.

        Raises:
            UnstageableError: a state that cannot be saved.
            RankFailedError, InconsistentRanksError: see :class:`stager.ranks.partition.Partitioner`.
        """
        return self._partitioner.take(
            flatten(state, self._group.own_rank, has_recipes=self._format.has_recipes), occasion
        )

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
        with real_tensors():
            return self._begin(timeline, tree, planner, may_move)

    def _begin(self, timeline: Timeline, tree: StateTree, planner: Planner, may_move: bool | None) -> Snapshot:
        plan, memory = planner.plan_and_hold(tree)
        if may_move is not None and plan is not self._shared_for:
            if self._sharer.share(tree.leaves, may_move):
                plan, memory = planner.plan_and_hold(tree)  # what was moved has another address now
            self._shared_for = plan if may_move else None
        blobs = plan.with_trailer([self._pickler.pickle(tree, leaf) for leaf in plan.objects])
        return Snapshot(timeline, tree, plan, blobs, SideStreams(set(plan.devices or ())), memory)

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
            batches = batch(of_piece)
            return Assignment(batches.copies, batches, kept=tuple(kept)), Assignment()
        protected, is_own = self._protected(snapshot)
        key, last = _SplitKey(protected, is_own, self._sharer.live_sources()), self._split
        if last is None or last.plan is not plan or last.key != key:
            last = self._split = self._divide(snapshot, key)
        snapshot.guarded = [*snapshot.guarded, *map(leaves.__getitem__, last.own_now)]
        return last.now, last.later

    def _divide(self, snapshot: Snapshot, key: _SplitKey) -> _Split:
        """Divide the copies of a plan into those made now and later, and these among the trainer and the workers.

        Also chooses where the tripwires of the later ones are.
        """
        plan, leaves = snapshot.plan, snapshot.tree.leaves
        protected, is_own, _ = key  # in the order of plan.leaves; empty if nothing is guarded
        copies = plan.copies
        may_wait = np.zeros(len(leaves), dtype=bool)
        may_wait[list(compress(plan.leaves, protected))] = True
        # A packed copy from host memory has no tripwire: nobody would notice a write through .data. So it is made now.
        waits = copies.all_in(may_wait) & ~(copies.is_packed & copies.on_host)
        now, later = (copies.where(~waits), copies.where(waits)) if waits.any() else (copies, NO_COPIES)
        own_now = set(compress(plan.leaves, is_own)).difference(later.all_leaves())
        now_work = self._assign(now, leaves, guarded=False)
        later_work = self._assign(later, leaves, guarded=True)
        self._wires = Wires.of(later_work.copies, snapshot.memory)
        return _Split(
            plan=plan,
            key=key,
            now=now_work,
            later=later_work,
            own_now=tuple(sorted(own_now)),
        )

    def _protected(self, snapshot: Snapshot) -> tuple[list[bool], list[bool]]:
        """Tell for each tensor, in the order of ``plan.leaves``, whether its copy may wait, and whether an optimizer has it.

        Both are empty if nothing is guarded.
        """
        if not self._guard:
            return [], []
        plan = snapshot.plan
        protection = self._guard.protects(plan, snapshot.tree.leaves, self._guard.tensors())
        snapshot.guarded = protection.others
        protected = protection.protected
        if self._torn:
            names = snapshot.tree.names
            protected = [
                is_protected and names[leaf] not in self._torn
                for leaf, is_protected in zip(plan.leaves, protected, strict=True)
            ]
        return protected, protection.is_own

    def arm(self, snapshot: Snapshot, later: Assignment) -> None:
        """Set the tripwires of what is copied after ``save()`` has returned. Call it right before."""
        if later.copies:
            snapshot.armed = self._wires.arm(snapshot.tree.leaves, snapshot.memory, snapshot.guarded)
        snapshot.guarded, snapshot.memory = (), TensorMemory()

    def _check(self, snapshot: Snapshot, slab: Slab) -> None:
        """Check the tripwires, now that everything is copied.

        Raises:
            TornSnapshotError: something else than a guarded step wrote to a guarded tensor.
        """
        armed, snapshot.armed = snapshot.armed, None
        if armed is None:
            return
        tripped = armed.tripped(slab)
        self._refuse_torn(
            snapshot, tripped.leaves.union(_leaves_over(tripped.places, snapshot.plan, armed.wires.leaves))
        )

    def _refuse_torn(self, snapshot: Snapshot, leaves: set[int]) -> None:
        """Raise if there are torn leaves, and copy them at once from the next save on.

        Raises:
            TornSnapshotError: names them.
        """
        torn = sorted(leaves)
        if not torn:
            return
        self._torn |= {snapshot.tree.names[leaf] for leaf in torn}
        names = [snapshot.tree.name(leaf) for leaf in torn]
        raise TornSnapshotError(
            f"{first_of(names, MOST_NAMES)} changed while the snapshot was still being copied, by something other than the "
            "step() of a guarded optimizer (code of yours, nn.Embedding with max_norm, weights swapped by .data.copy_(), a "
            "storage that was resized or put into shared memory, another optimizer). This save is not committed: save "
            "again. Before your code writes to guarded tensors, call wait_for_staging(), or wait for the save's "
            "staging_completion. From the next save on, save() copies these tensors before it returns, which makes it slower"
        )

    def _assign(self, copies: Copies, leaves: Sequence[Any], *, guarded: bool) -> Assignment:
        by_trainer, by_workers = self._sharer.split(copies, leaves, guarded=guarded)
        return Assignment(copies, batch(by_trainer, self._num_parts), tuple(by_workers))

    def copy(
        self,
        snapshot: Snapshot,
        work: Assignment,
        slab: Slab,
        wrote: Wrote = tell_nobody,
        *,
        cold: bool,
        background: bool,
    ) -> None:
        """Copy into a slab; returns when every byte is there.

        Args:
            wrote: told of each range that the trainer has copied.
            cold: pages of the slab may not be allocated yet.
            background: the trainer does not wait for it.

        Raises:
            TornSnapshotError: something wrote to the sources meanwhile, or freed them: a tripwire says so, the kernel, or
                ``staging.verify``.
        """
        # Until all is copied, compared, and the tripwires are read.
        held = snapshot.armed.held if background and snapshot.armed is not None else None
        try:
            self._copy(snapshot, work, slab, held, wrote, cold=cold, background=background)
        except MemoryGoneError as error:
            if held is not None:
                later = set(held.sources.copies.all_leaves())
                self._refuse_torn(snapshot, held.lost() or held.leaves_at(error.address) or later)
            raise TornSnapshotError(
                "memory of a tensor was freed while save() copied it: another thread resized a storage of the state. "
                "Nothing of this save is committed: save again, and resize storages after save() has returned"
            ) from None
        except TornSnapshotError:
            raise
        except Exception:  # of torch, or of a worker, when a storage has other memory than it had at save()
            if held is not None:
                self._refuse_torn(snapshot, held.lost())
            raise

    def _copy(
        self,
        snapshot: Snapshot,
        work: Assignment,
        slab: Slab,
        held: HeldSources | None,
        wrote: Wrote,
        *,
        cold: bool,
        background: bool,
    ) -> None:
        timeline = snapshot.timeline
        leaves: Sequence[Any] = snapshot.tree.leaves
        if held is not None:
            leaves = held.leaves
            self._refuse_torn(snapshot, held.lost())

        def copy_here(batches: Batches) -> None:
            self._copier.copy(batches, leaves, slab, snapshot.streams, cold=cold, background=background, wrote=wrote)

        with timeline.timed("stage"):
            if work.by_workers:
                copied = self._sharer.copy(
                    work.by_workers,
                    slab,
                    lambda copies: copy_here(batch(copies)),
                    lambda: copy_here(work.by_trainer),
                )
                for result in copied.results:
                    timeline.timing("stage", result.started, result.ended, f"worker {result.pid}")
                for note in copied.notes:
                    timeline.note(note)
            else:
                copy_here(work.by_trainer)
        if background:
            self._check(snapshot, slab)
        if self._verify:
            with timeline.timed("verify"):
                compare(work.copies, leaves, slab, snapshot.tree.name, may_go=background)

    def forget(self) -> None:
        """Drop what was kept for the next save."""
        self._split = self._shared_for = None
        self._partitioner.forget()
        self._pickler.forget()


def _leaves_over(places: Sequence[Place], plan: SnapshotPlan, among: Sequence[int]) -> Iterator[int]:
    """Find the leaves whose memory overlaps one of these places."""
    if not places:
        return
    watched = set(among)
    memory = [
        (leaf, start, start + nbytes)
        for leaf, start, nbytes in zip(plan.leaves, plan.addresses, plan.spans, strict=True)
    ]
    for start, nbytes in places:
        end = start + nbytes
        yield from (leaf for leaf, first, last in memory if first < end and start < last and leaf in watched)
