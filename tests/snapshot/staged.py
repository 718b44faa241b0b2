"""Snapshots without workers: taken into a slab, and read back from there by the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from stager.ranks.rank_group import RankGroup
from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.snapshot.copying import Copier
from stager.snapshot.guard import Guard
from stager.snapshot.pieces import whole
from stager.snapshot.taker import Snapshot, SnapshotTaker
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner, SnapshotPlan
from stager.telemetry.timeline import Timeline
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.dtypes import dtype_of, tensor_over
from stager.workers.memory.slab import Slab
from tests.states import same


class Bench:
    """A planner and a taker that live through many snapshots, as in a Checkpointer."""

    def __init__(self, *, guard: Guard | None = None, num_threads: int = 2, verify: bool = True) -> None:
        self.planner = Planner(get_format("dcp"), 2, 1 << 20)
        self.copier = Copier(num_threads)
        self.guard = guard or Guard(lambda: None)
        sharer = SourceSharer(cast(Any, None), 1, SharingOptions("trainer"))  # no pool: the trainer copies all
        self.taker = SnapshotTaker(get_format("dcp"), self.copier, self.guard, sharer, RankGroup(), 1, verify=verify)

    def begin(self, state: Mapping[str, Any]) -> Snapshot:
        return self.taker.begin(Timeline(0, "nonce"), flatten(state), self.planner)

    def stage(self, state: Mapping[str, Any], *, cold: bool = True, background: bool = False) -> tuple[Slab, Snapshot]:
        """All of it, whatever is guarded."""
        snapshot = self.begin(state)
        pieces = whole(snapshot.plan, snapshot.blobs, 2)
        slab = Slab.create(pieces.slab_nbytes)
        for batches in self.taker.split(snapshot, pieces, pieces.pieces[0]):
            self.taker.copy(snapshot, batches, slab, cold=cold, background=background)
        return slab, snapshot

    def close(self) -> None:
        self.guard.close()
        self.copier.close()


def read_back(slab: Slab, plan: SnapshotPlan) -> Any:
    """The state as the slab holds it; pickled objects are None."""
    items = plan.layout.tensors

    def leaf(index: int) -> torch.Tensor | None:
        if index >= len(items):
            return None
        item = items[index]
        raw = slab.storage[item.slab_offset : item.slab_offset + item.data_nbytes].clone()
        return tensor_over(raw, dtype_of(item.dtype), item.shape, item.stride)

    return build(plan.layout.structure, leaf)


def tensors_are_staged(state: Any, slab: Slab, plan: SnapshotPlan) -> bool:
    return _same_tensors(state, read_back(slab, plan))


def _same_tensors(state: Any, staged: Any) -> bool:
    if isinstance(staged, torch.Tensor):
        return same(state, staged)
    if isinstance(staged, Mapping):
        return list(state) == list(staged) and all(_same_tensors(state[key], staged[key]) for key in staged)
    if isinstance(staged, list):
        return len(state) == len(staged) and all(map(_same_tensors, state, staged))
    return staged is None and not (isinstance(state, torch.Tensor) and state.layout is torch.strided)  # pickled
