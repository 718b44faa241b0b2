"""Records and receipts of many ranks, as their workers leave them, without the data files that no commit reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stager.ranks.naming import name_all, name_written
from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.documents.receipt import Receipt
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.formats.contract import TensorSpec, TensorSpecs, evenly
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, Templates, align, partition_once
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan, objects_to_json
from stager.workers.checkpoint.layout.structure import ABSENT, Node
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import Extent, WriteTask, record_name, to_record
from tests.benchmarks.scale.size import Size

_SHARD = (4, 8192)  # lengths of each tensor's shard, float32
_OBJECT_BYTES = 3000
_SEGMENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Memory:
    """Where a job's documents lie."""

    view: memoryview


def write_shares(directory: str, size: Size) -> tuple[SaveSpec, Layout]:
    """Fill a partial directory in ``directory``.

    Returns:
        Facts and layout of rank 0, which are all that a committing worker of it has.
    """
    assert size.ranks % size.shards == 0
    for rank in range(size.ranks):
        job, layout = _job(directory, size, rank)
        if rank == 0:
            own = job.spec, layout
            os.mkdir(partial_path(job.spec))
        _write(job, layout)
    return own


def _job(directory: str, size: Size, rank: int) -> tuple[WriteTask, Layout]:
    plan, objects = _plan(size, rank), _objects(size)
    spec = SaveSpec(directory, 1, f"{1:016x}", "dcp", 1, False, 1e9, "0", "2", rank=rank, num_ranks=size.ranks)
    text, of_objects = plan.to_document().partition(b"\n")[0], objects_to_json(objects)
    memory: Any = _Memory(memoryview(text + of_objects))
    extents = Extent(0, len(text)), Extent(len(text), len(of_objects))
    job = WriteTask(spec, memory, extents[0], "", extents[1], frozenset())
    return job, plan.with_objects([_in_file(item, len(plan.files)) for item in objects])


def _plan(size: Size, rank: int) -> LayoutPlan:
    """Ranks that share a shard divide its tensors evenly."""
    num_replicas, replica = size.ranks // size.shards, rank // size.shards
    first, end = (size.tensors * (replica + side) // num_replicas for side in (0, 1))
    tensors, named = _laid_out(end - first)
    return LayoutPlan(
        files=tuple(FileSpec(file.name.replace("__0_", f"__{rank}_"), file.nbytes) for file in named),
        object_file=get_format("dcp").object_file_name(rank),
        tensors=tensors,
        structure=_structure(size, rank, range(first, end)),
        segment_bytes=_SEGMENT_BYTES,
        templates=_templates() if rank == 0 else None,
    )


@lru_cache
def _laid_out(num_tensors: int) -> tuple[Items, tuple[FileSpec, ...]]:
    spec = TensorSpec((("w",),), ("w",), "float32", _SHARD, (_SHARD[1], 1))
    laid_out = get_format("dcp").lay_out(TensorSpecs.of([spec] * num_tensors), 0, evenly(1))
    return laid_out.items, laid_out.files


@lru_cache
def _templates() -> Templates:
    return get_format("dcp").templates(_laid_out(1)[0].kinds)


def _structure(size: Size, rank: int, held: range) -> Node:
    """Of the leaves of the whole state, the tensors come first."""
    shard, num_leaves = rank % size.shards, size.tensors + size.objects
    own = [f"object_{number}" for number in range(size.objects)]
    private = ["dict", [f"rank-{rank}"], [["dict", own, list(range(size.tensors, num_leaves))]]]
    model = ["dict", _names(size.tensors), list(range(size.tensors))]

    def node_of(leaf: int) -> Node:
        if leaf >= size.tensors:
            return leaf - size.tensors + len(held)
        if leaf not in held:
            return ABSENT
        return ["chunks", [size.shards * _SHARD[0], _SHARD[1]], [[[shard * _SHARD[0], 0], leaf - held[0]]]]

    name = name_written if rank else name_all  # as stager/ranks/partition.py
    return name(["dict", ["model", "own"], [model, private]], node_of)


@lru_cache
def _names(num_tensors: int) -> list[str]:
    return [f"layers.{number // 9}.feed_forward.w{number % 9}.weight" for number in range(num_tensors)]


def _objects(size: Size) -> list[Item]:
    step = align(_OBJECT_BYTES)
    return [
        Item("object", 1, at, _OBJECT_BYTES, at, _OBJECT_BYTES, "", (), (), at)
        for at in range(0, step * size.objects, step)
    ]


def _in_file(item: Item, file: int) -> Item:
    return Item.from_row([item.kind, file, *item.to_row()[2:]], item.slab_offset)


def _write(job: WriteTask, layout: Layout) -> None:
    spec, partial = job.spec, partial_path(job.spec)
    directory_fd = files.open_directory(partial)
    try:
        files.write_atomically(directory_fd, partial, record_name(spec.rank), to_record(job), spec.fsync)
        hashes = tuple(f"{number:032x}" for number in range(len(partition_once(layout, 1)[0])))
        receipt = Receipt(0, 1, spec.save_id, hashes, os.getpid(), 1e9, 1e9, 1e9, rank=spec.rank)
        files.write_atomically(directory_fd, partial, receipt.name, receipt.to_bytes(), spec.fsync)
    finally:
        os.close(directory_fd)
