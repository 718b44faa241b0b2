"""The write task: what a worker is sent. It fits a message, and with it workers finish a save without the trainer.

slab:  | tensor bytes ... | plan JSON, newline, templates | object bytes ... | objects JSON |
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_back import PLAIN, Writing
from stager.workers.gc_pause import no_collection
from stager.workers.memory.attached import Memory

_CACHED_PLANS = 2  # for states that are saved in turn; a plan takes about 1 KiB per tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the slab."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WriteTask:
    """A save, as workers write it.

    Attributes:
        slab: the memory of the snapshot, or of one piece of it.
        plan, plan_id: where the layout plan lies, and its hash (equal plans are parsed once).
        objects: where the objects document lies.
        live_slabs: the slabs that the trainer still uses; workers unmap the others.
        base: the offset in the whole snapshot of the slab's first byte; 0 unless the slab has a later piece.
    """

    spec: SaveSpec
    slab: Memory
    plan: Extent
    plan_id: str
    objects: Extent
    live_slabs: frozenset[str]
    base: int = 0
    writing: Writing = PLAIN


_plans: OrderedDict[str, LayoutPlan] = OrderedDict()


def read_layout(task: WriteTask) -> Layout:
    """Return the layout of a task; parses its plan if this worker does not have it yet."""
    plan = _plans.get(task.plan_id)
    if plan is None:
        with no_collection():
            plan = _plans[task.plan_id] = LayoutPlan.from_document(read_extent(task, task.plan))
        while len(_plans) > _CACHED_PLANS:
            _plans.popitem(last=False)
    rows = json.loads(read_extent(task, task.objects))
    return plan.with_objects([Item.from_row(row[:-1], row[-1]) for row in rows])


def read_extent(task: WriteTask, extent: Extent) -> bytes:
    """Return the bytes of an extent of the task's slab."""
    return bytes(task.slab.view[extent.offset : extent.offset + extent.nbytes])
