"""What goes into a slab behind the tensors, and the message that tells the workers where it is (``workers/job.py``)."""

from __future__ import annotations

from stager.plan import SnapshotPlan
from workers.job import Extent, SaveFacts, SaveJob, objects_to_json
from workers.layout import Item, align
from workers.slab import Slab

_OBJECT_SLACK = 1.25  # pickled objects grow a little from save to save; the slab should still fit


def slab_nbytes(plan: SnapshotPlan, blobs: list[bytes]) -> int:
    """What a snapshot needs: tensors, plan, objects and the objects' rows, with room for the objects to grow."""
    objects = sum(align(len(blob)) for blob in blobs) + 256 * len(blobs)
    return align(plan.nbytes) + align(len(plan.document)) + int(objects * _OBJECT_SLACK) + 4096


def write_job(
    facts: SaveFacts, plan: SnapshotPlan, blobs: list[bytes], slab: Slab, live_slabs: frozenset[str]
) -> SaveJob:
    """Write plan and pickled objects into the slab; returns the job that refers to them."""
    cursor = _Cursor(slab, plan.nbytes)
    document = cursor.put(plan.document)
    items: list[Item] = []
    offset = 0
    for blob in blobs:
        place = cursor.put(blob)
        # The objects' file is the one after the tensors' files, however many the plan has.
        items.append(Item("object", plan.num_files, offset, len(blob), offset, len(blob), "", (), (), place.offset))
        offset = align(offset + len(blob))
    objects = cursor.put(objects_to_json(items))
    return SaveJob(facts, slab, document, plan.plan_id, objects, live_slabs)


class _Cursor:
    """Appends bytes to a slab behind the tensors."""

    def __init__(self, slab: Slab, offset: int) -> None:
        self._view = slab.view
        self._offset = align(offset)

    def put(self, data: bytes) -> Extent:
        extent = Extent(self._offset, len(data))
        self._view[extent.offset : extent.offset + extent.nbytes] = data
        self._offset = align(extent.offset + extent.nbytes)
        return extent
