"""One save as the workers see it: small enough for a message, complete enough to finish without the trainer.

slab:  | tensor bytes ... | plan JSON, newline, templates | object bytes ... | objects JSON |
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.plan_cache import no_collection
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_back import PLAIN, Writing
from stager.workers.memory.attached import Memory

_CACHED_PLANS = 2  # what is saved in turn; each takes about 1 KiB a tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the slab."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WriteTask:
    """Attributes:
    spec: which save this is.
    slab: the snapshot.
    plan, plan_id: where the plan lies, and its hash (equal plans are parsed once).
    objects: where the objects document lies.
    live_slabs: what the trainer still holds; workers unmap the others.
    base: where a whole snapshot's slab has the first byte of this one, which may hold a piece of it only.
    writing: how the bytes get to the disk.
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
    """The layout of a task, from its slab."""
    plan = _plans.get(task.plan_id)
    if plan is None:
        with no_collection():
            plan = _plans[task.plan_id] = LayoutPlan.from_document(read_extent(task, task.plan))
        while len(_plans) > _CACHED_PLANS:
            _plans.popitem(last=False)
    rows = json.loads(read_extent(task, task.objects))
    return plan.with_objects([Item.from_row(row[:-1], row[-1]) for row in rows])


def read_extent(task: WriteTask, extent: Extent) -> bytes:
    return bytes(task.slab.view[extent.offset : extent.offset + extent.nbytes])
