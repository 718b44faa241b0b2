"""Tensors that are spread over ranks (DTensor), filled each rank for itself: through DCP's planner, over stager's reader.

The planner cuts what this rank holds out of what the checkpoint has, a whole or the chunks of however many ranks wrote it;
so the number of ranks and their layout may differ from those of the save. Nothing is exchanged between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from stager.loading.dcp.index import index_of
from stager.loading.dcp.read_plan import read_plan
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.read.blob_reader import BlobReader


@dataclass(frozen=True, slots=True)
class Sharded:
    """The item (or whole) that a DTensor gets, and the name that DCP gives it."""

    index: int
    name: str
    tensor: torch.Tensor


def fill_sharded(path: str, manifest: Manifest, reader: BlobReader, sharded: Sequence[Sharded]) -> None:
    """Read what this rank holds of each.

    Args:
        path, manifest: of the checkpoint, as it is stored.
        sharded: their global shapes are those of the checkpoint; other dtypes are converted.

    Raises:
        CorruptCheckpointError, StorageError
    """
    state = {one.name: one.tensor for one in sharded}
    index = index_of(path, manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(state, index.metadata, is_coordinator=False)
        plan = planner.finish_plan(planner.create_local_plan())
        read_plan(index, reader, plan, planner)
