"""Stock DCP's plans, write results and metadata for a state of many ranks, through torch's own planner and writer."""

from __future__ import annotations

import gc
import pickle
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from tests.benchmarks.scale.measured import Stock
from tests.benchmarks.scale.size import Size
from tests.benchmarks.scale.stages import Stages

_SHARD = (4, 8192)
_LENGTHS = torch.Size(_SHARD)


def measure_stock(directory: str, size: Size) -> Stock:
    """The steps of ``_save_state_dict`` between its collectives, for tensors; ``size.objects`` are left out."""
    plans = [pickle.dumps(_plan(size, rank)) for rank in range(size.ranks)]
    stages = Stages()
    writer = FileSystemWriter(tempfile.mkdtemp(dir=directory), sync_files=False)
    global_plans, metadata, scattered = _plan_all(plans, writer)
    plan_secs = stages.lap()
    plan_bytes = max(map(len, [*plans, *scattered]))
    results = [pickle.dumps(_results(plan, rank)) for rank, plan in enumerate(global_plans)]
    del plans, global_plans, scattered
    stages.lap()
    writer.finish(metadata, [pickle.loads(result) for result in results])
    broadcast = pickle.dumps(metadata)  # once more: the file is not what is sent
    finish_secs = stages.lap()
    del metadata
    gc.collect()  # or memory that no other rank has would keep the collector from looking
    stages.lap()
    pickle.loads(broadcast)
    return Stock(
        plan_bytes=size.ranks * plan_bytes,
        result_bytes=size.ranks * max(map(len, results)),
        metadata_bytes=len(broadcast),
        plan_secs=plan_secs,
        finish_secs=finish_secs,
        load_secs=stages.lap(),
    )


def _plan_all(plans: Sequence[bytes], writer: FileSystemWriter) -> tuple[list[SavePlan], Metadata, list[bytes]]:
    """Rank 0 in ``reduce_scatter("plan", ...)``: what was gathered is unpickled, what is scattered pickled."""
    global_plans, metadata = DefaultSavePlanner().create_global_plan([pickle.loads(plan) for plan in plans])
    global_plans = writer.prepare_global_plan(global_plans)
    return global_plans, metadata, [pickle.dumps(plan) for plan in global_plans]


def _plan(size: Size, rank: int) -> SavePlan:
    """As ``create_default_local_save_plan`` makes it of DTensors: an item of each, replicated or not."""
    offsets = torch.Size((rank % size.shards * _SHARD[0], 0))
    whole = torch.Size((size.shards * _SHARD[0], _SHARD[1]))
    items = []
    for number in range(size.tensors):
        data = TensorWriteData(ChunkStorageMetadata(offsets, _LENGTHS), TensorProperties(torch.float32), whole)
        items.append(WriteItem(MetadataIndex(_name(number), offsets), WriteItemType.SHARD, tensor_data=data))
    mappings: Any = {item.index.fqn: ("model", item.index.fqn.partition(".")[2]) for item in items}
    return SavePlan(items, planner_data=mappings)


def _name(number: int) -> str:
    return f"model.layers.{number // 9}.feed_forward.w{number % 9}.weight"


def _results(plan: SavePlan, rank: int) -> list[WriteResult]:
    """As ``FileSystemWriter.write_data`` gives them."""
    nbytes = 4 * _LENGTHS.numel()
    return [
        WriteResult(item.index, nbytes, _StorageInfo(f"__{rank}_0.distcp", number * nbytes, nbytes))
        for number, item in enumerate(plan.items)
    ]
