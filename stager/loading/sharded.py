"""DTensors of the target: each rank reads its own shard, through DCP's load planner and stager's reader.

The planner cuts this rank's shard out of the whole tensor, or out of the chunks that other ranks wrote. So the number of
ranks and the placements may differ from those of the save. The ranks exchange nothing.
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
    """A DTensor of the target, the item or whole that it receives, and the name that DCP gives it."""

    index: int
    name: str
    tensor: torch.Tensor


def fill_sharded(path: str, manifest: Manifest, reader: BlobReader, sharded: Sequence[Sharded]) -> None:
    """Read this rank's shard of each DTensor.

    Args:
        path: the checkpoint's directory.
        manifest: of the checkpoint, as it is stored.
        reader: of the checkpoint.
        sharded: their global shapes equal those of the checkpoint; other dtypes are converted.

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
