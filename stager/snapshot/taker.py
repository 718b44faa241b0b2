"""Taking a snapshot: from the state to its plan, and from the sources into the slab.

Who copies what is decided here, once for as long as the plan, the guarded memory and the shared sources stay the same:

                    now: before save() returns          later: while training goes on
    the trainer     its threads (``copying.py``)        fewer threads, niced
    the workers     from sources in shared memory (``stager/sharing``), as ``staging.location`` says
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.ranks.partition import Partitioner
from stager.ranks.rank_group import RankGroup
from stager.saving.save import SaveHandle
from stager.sharing.sharer import SourceSharer
from stager.snapshot.batches import Batches, batch
from stager.snapshot.copying import Copier, compare
from stager.snapshot.device import Ready, mark_ready
from stager.snapshot.guard import Guard
from stager.state.flatten import StateTree, flatten
from stager.state.placement import Copy
from stager.state.snapshot_plan import Planner, SnapshotPlan
from stager.workers.checkpoint.formats import Format
from stager.workers.errors import UnstageableError
from stager.workers.memory.slab import Slab

logger = logging.getLogger("stager")

_SAFE_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, list, tuple, set)
_CACHED_TYPES = (type(None), bool, int, str)  # hashable, and equal only when they are the same in every bit
_CACHED_BLOBS = 4096


@dataclass(slots=True)
class Snapshot:
    """A save on its way to the hand-over. Holds the sources alive until they are copied.

    Attributes:
        blobs: the pickled objects, in the order of ``plan.objects``, and what the format puts behind them, if anything.
        ready: when device tensors may be read.
    """

    handle: SaveHandle
    flat: StateTree
    plan: SnapshotPlan
    blobs: list[bytes]
    ready: Ready | None

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes + sum(map(len, self.blobs))


@dataclass(frozen=True, slots=True)
class Work:
    """Copies, and who does them."""

    copies: tuple[Copy, ...]
    by_trainer: Batches
    by_workers: tuple[Copy, ...]


class SnapshotTaker:
    """Args:
    sharer: None when everything is copied by the trainer.
    verify: compare each copy with its source.
    group: whose ranks make one checkpoint together; None: this process alone.
    """

    def __init__(
        self,
        file_format: Format,
        copier: Copier,
        guard: Guard,
        sharer: SourceSharer | None = None,
        *,
        verify: bool,
        group: RankGroup | None = None,
    ) -> None:
        self._format = file_format
        self._copier = copier
        self._guard = guard
        self._sharer = sharer
        self._verify = verify
        self._group = group or RankGroup()
        self._share = Partitioner(self._group)
        self._shared_for: SnapshotPlan | None = None
        self._split: tuple[SnapshotPlan, list[bool], frozenset[int], Work, Work] | None = None
        self._blobs: dict[tuple[type, Any], bytes] = {}
        self._pickle_checked: set[type] = set()

    def flatten(self, state: Mapping[str, Any], occasion: str) -> StateTree:
        """This rank's share of the leaves.

        Args:
            occasion: the save's id.

        Raises:
            UnstageableError: a state that cannot be saved.
            RankFailedError, InconsistentRanksError: see :class:`stager.ranks.partition.Partitioner`.
        """
        return self._share.take(flatten(state, self._group.own_rank), occasion)

    def begin(self, handle: SaveHandle, flat: StateTree, planner: Planner, *, may_move: bool | None = None) -> Snapshot:
        """Plan and pickle; nothing is copied yet.

        Args:
            may_move: whether sources may be moved into shared memory now: no snapshot is being taken. None: leave them
                alone, the trainer copies them.

        Raises:
            UnstageableError: a value cannot be saved; names its key path.
        """
        plan = planner.plan(flat)
        if self._sharer is not None and may_move is not None and plan is not self._shared_for:
            self._sharer.share(flat.leaves, may_move)
            plan = planner.plan(flat)  # what was moved has another address now
            self._shared_for = plan if may_move else None
        blobs = plan.closed([self._pickle(flat, leaf) for leaf in plan.objects])
        return Snapshot(handle, flat, plan, blobs, mark_ready(set(plan.devices or ())))

    def split(self, snapshot: Snapshot) -> tuple[Work, Work]:
        """What has to be copied now, and what may wait. See NOTE [ Overlap is safe by construction ]."""
        plan = snapshot.plan
        protected = self._guard.protects(plan) if self._guard else []
        sources = self._sharer.live_sources() if self._sharer is not None else frozenset[int]()
        if self._split is not None and self._split[0] is plan and self._split[1:3] == (protected, sources):
            return self._split[3:]
        may_wait = {leaf for leaf, is_so in zip(plan.leaves, protected, strict=False) if is_so}
        later = [copy for copy in plan.copies if may_wait.issuperset(copy.leaves)]
        now = [copy for copy in plan.copies if not may_wait.issuperset(copy.leaves)]
        leaves = snapshot.flat.leaves
        works = self._assign(now, leaves, guarded=False), self._assign(later, leaves, guarded=True)
        self._split = (plan, protected, sources, *works)
        return works

    def _assign(self, copies: list[Copy], leaves: Sequence[Any], *, guarded: bool) -> Work:
        by_trainer, by_workers = copies, list[Copy]()
        if self._sharer is not None:
            by_trainer, by_workers = self._sharer.split(copies, leaves, guarded=guarded)
        return Work(tuple(copies), batch(by_trainer), tuple(by_workers))

    def copy(self, snapshot: Snapshot, work: Work, slab: Slab, *, cold: bool, background: bool) -> None:
        """
        Raises:
            TornSnapshotError: it is to be verified, and somebody wrote to the sources meanwhile.
        """
        started = time.time()
        leaves = snapshot.flat.leaves

        def copy_here(batches: Batches) -> None:
            self._copier.copy(batches, leaves, slab, snapshot.ready, cold=cold, background=background)

        if work.by_workers and self._sharer is not None:
            meanwhile = work.by_trainer.copies
            copied = self._sharer.copy(
                work.by_workers,
                slab,
                lambda copies: copy_here(work.by_trainer if tuple(copies) == meanwhile else batch(copies)),
                meanwhile,
            )
            for result in copied.results:
                snapshot.handle._event("stage", result.started, result.ended, f"worker {result.pid}")
            for note in copied.notes:
                snapshot.handle._note(note)
        else:
            copy_here(work.by_trainer)
        snapshot.handle._event("stage", started)
        if self._verify:
            started = time.time()
            compare(work.copies, leaves, slab, snapshot.flat.name)
            snapshot.handle._event("verify", started)

    def copy_all(self, snapshot: Snapshot, copies: Sequence[Copy], slab: Slab, *, cold: bool) -> None:
        """Now, by the trainer."""
        self.copy(snapshot, Work(tuple(copies), batch(copies), ()), slab, cold=cold, background=False)

    def forget(self) -> None:
        self._split = self._shared_for = None
        self._share.forget()
        self._blobs.clear()

    def _pickle(self, flat: StateTree, leaf: int) -> bytes:
        value = flat.leaves[leaf]
        kind = type(value)
        if kind in _CACHED_TYPES and (blob := self._blobs.get((kind, value))) is not None:
            return blob
        try:
            blob = self._format.object_blob(value, leaf)
        except Exception as error:
            raise UnstageableError(flat.name(leaf), f"{kind.__name__} cannot be pickled: {error}") from error
        if kind in _CACHED_TYPES and len(self._blobs) < _CACHED_BLOBS:
            self._blobs[kind, value] = blob
        if kind not in _SAFE_TYPES and kind not in self._pickle_checked:
            self._pickle_checked.add(kind)
            _warn_if_unsafe(flat.name(leaf), kind, blob)
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
