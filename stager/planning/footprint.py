"""Measuring a state with stager's own planner: what one save of it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stager.config import StagerConfig
from stager.planning.source import PickledObject
from stager.planning.stand_in import with_stand_ins
from stager.snapshot.object_pickler import why_not_pickled
from stager.snapshot.pieces import Pieces, cut, object_items, segment_bytes_for, whole
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner, SnapshotPlan
from stager.state.state_tree import StateTree
from stager.workers._version import __version__
from stager.workers.checkpoint.documents.manifest import IndexFile, Manifest, ManifestHeader
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.layout import Layout, num_segments
from stager.workers.errors import UnstageableError

_HASH = "0" * 32


@dataclass(frozen=True)
class Footprint:
    """What one save of a state takes.

    Attributes:
        num_tensors, num_objects: number of values; tied tensors count once.
        tensor_nbytes: size of the tensors in the slab.
        object_nbytes: size of the pickled objects.
        slab_nbytes: size of a snapshot.
        disk_nbytes: size of a checkpoint, including the manifest.
    """

    num_tensors: int
    num_objects: int
    tensor_nbytes: int
    object_nbytes: int
    slab_nbytes: int
    disk_nbytes: int


class Measured:
    """The state of one rank, laid out as for a save.

    Args:
        state: as for ``save()``; tensors may be on the meta device.
        num_workers: number of workers of the rank.
        num_shards: number of ranks that each tensor is sharded over.

    Raises:
        UnstageableError: a value cannot be saved; names its key path.
    """

    def __init__(self, state: Mapping[str, Any], config: StagerConfig, num_workers: int, num_shards: int = 1) -> None:
        self._format = get_format(config.persistence.format)
        self._kind = config.persistence.format
        self._num_workers = num_workers
        self._segment_bytes = config.persistence.segment_bytes
        self._flat = with_stand_ins(flatten(state), num_shards)
        self._incremental = config.persistence.incremental
        self._num_buffers = config.arena.buffers
        planner = Planner(self._format, num_workers, self._segment_bytes, incremental=self._incremental)
        plan = planner.plan(self._flat)
        blobs = [self._blob(self._flat, leaf) for leaf in plan.objects]
        self._blobs = plan.with_trailer(blobs)
        self.footprint = Footprint(
            num_tensors=plan.num_tensors,
            num_objects=len(plan.objects),
            tensor_nbytes=plan.nbytes,
            object_nbytes=sum(map(len, blobs)),
            slab_nbytes=whole(plan, self._blobs, num_workers).slab_nbytes,
            disk_nbytes=self._on_disk(plan),
        )

    def in_pieces(self, budget_nbytes: int) -> Pieces:
        """Cut the state into pieces that fit slabs of at most ``budget_nbytes`` bytes.

        Raises:
            MemoryBudgetError: not even one piece fits.
        """
        segment_bytes = segment_bytes_for(budget_nbytes, self._segment_bytes)
        planner = Planner(self._format, self._num_workers, segment_bytes, in_order=True, incremental=self._incremental)
        plan = planner.plan(self._flat)
        return cut(plan, self._blobs, budget_nbytes, self._num_buffers, incremental=self._incremental)

    def _blob(self, flat: StateTree, leaf: int) -> bytes:
        value = flat.leaves[leaf]
        if isinstance(value, PickledObject):
            return self._stand_in(value.nbytes, leaf)
        try:
            return self._format.object_blob(value, leaf).blob
        except Exception as error:
            raise UnstageableError(flat.name(leaf), why_not_pickled(value, error)) from error

    def _stand_in(self, nbytes: int, leaf: int) -> bytes:
        """A blob of about this size, or of the smallest possible size."""
        smallest = len(self._format.object_blob("", leaf).blob)
        return self._format.object_blob("x" * max(0, nbytes - smallest), leaf).blob

    def _on_disk(self, plan: SnapshotPlan) -> int:
        layout = plan.layout.with_objects(object_items(plan, self._blobs, 0))
        index = self._format.index_files(layout, _HASH[:16], "")
        manifest = self._manifest(layout, index).to_bytes()
        return sum(file.nbytes for file in layout.files) + sum(map(len, index.values())) + len(manifest)

    def _manifest(self, layout: Layout, index: Mapping[str, bytes]) -> Manifest:
        """The manifest of a save, but for hashes and time."""
        return Manifest(
            header=ManifestHeader(self._kind, 10**8, _HASH[:16], 1e9 + 0.123456, torch.__version__, __version__),
            layout=layout,
            hashes=tuple(
                (_HASH,) * num_segments(end - item.offset, layout.segment_bytes) for _, item, end in layout.spans()
            ),
            index_files=tuple(IndexFile(name, len(data), _HASH) for name, data in index.items()),
        )
