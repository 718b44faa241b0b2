"""What goes into a slab behind the tensors, and the message that tells the workers where it is (``workers/checkpoint/write/save_spec.py``)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from stager.state.snapshot_plan import SnapshotPlan
from stager.workers.checkpoint.layout.layout import Item, align
from stager.workers.checkpoint.layout.layout_plan import objects_to_json
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import Extent, WriteTask
from stager.workers.memory.slab import Slab

_OBJECT_SLACK = 1.25  # pickled objects grow a little from save to save; the slab should still fit
_ROW_BYTES = 256  # of an object in the objects document, at most


def slab_nbytes(plan: SnapshotPlan, blobs: Sequence[bytes]) -> int:
    """What a snapshot needs: tensors, plan, objects and the objects' rows, with room for the objects to grow."""
    objects = sum(align(len(blob)) for blob in blobs) + _ROW_BYTES * len(blobs)
    return align(plan.nbytes) + align(len(plan.document)) + int(objects * _OBJECT_SLACK) + 4096


def object_items(plan: SnapshotPlan, blobs: Sequence[bytes], slab_offset: int) -> list[Item]:
    """The places of the blobs, those of objects and the frame that may follow: behind the tensors in the files, and in the
    slab from ``slab_offset``."""
    items: list[Item] = []
    file, start = plan.layout.object_place
    offset = start
    for number, blob in enumerate(blobs):
        kind = "object" if number < len(plan.objects) else "frame"
        nbytes, in_slab = len(blob), slab_offset + offset - start
        items.append(Item(kind, file, offset, nbytes, offset, nbytes, "", (), (), in_slab))
        offset = align(offset + nbytes)
    return items


class SlabWriter:
    """Writes jobs into slabs. A slab that holds a plan already, from the save before, keeps it."""

    def __init__(self) -> None:
        self._plans: weakref.WeakKeyDictionary[Slab, tuple[str, int]] = weakref.WeakKeyDictionary()

    def write(
        self,
        spec: SaveSpec,
        plan: SnapshotPlan,
        blobs: Sequence[bytes],
        slab: Slab,
        live_slabs: frozenset[str],
    ) -> WriteTask:
        """A whole snapshot: plan and pickled objects behind the tensors."""
        document = self._put_plan(plan, slab, align(plan.nbytes))
        offset = align(document.offset + document.nbytes)
        items = object_items(plan, blobs, offset)
        for item, blob in zip(items, blobs, strict=True):
            put(slab, item.slab_offset, blob)
            offset = align(item.slab_offset + len(blob))
        objects = put(slab, offset, objects_to_json(items))
        return WriteTask(spec, slab, document, plan.plan_id, objects, live_slabs)

    def _put_plan(self, plan: SnapshotPlan, slab: Slab, offset: int) -> Extent:
        """Copying it is most of the work for a state of many small tensors."""
        if self._plans.get(slab) != (plan.plan_id, offset):
            put(slab, offset, plan.document)
            self._plans[slab] = (plan.plan_id, offset)
        return Extent(offset, len(plan.document))

    def write_piece(
        self,
        spec: SaveSpec,
        plan: SnapshotPlan,
        items: Sequence[Item],
        slab: Slab,
        live_slabs: frozenset[str],
        base: int,
        nbytes: int,
    ) -> WriteTask:
        """One piece of a snapshot: ``nbytes`` bytes, which a whole snapshot would have at ``base``."""
        self._plans.pop(slab, None)
        document = put(slab, align(nbytes), plan.document)
        objects = put(slab, align(document.offset + document.nbytes), objects_to_json(items))
        return WriteTask(spec, slab, document, plan.plan_id, objects, live_slabs, base)


def put(slab: Slab, offset: int, data: bytes) -> Extent:
    slab.view[offset : offset + len(data)] = data
    return Extent(offset, len(data))
