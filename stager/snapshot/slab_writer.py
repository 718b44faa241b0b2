"""What goes into a slab beside the tensors, and the message that tells the workers where it is (``write_task.py``)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from stager.snapshot.pieces import Piece, Pieces, blobs_of
from stager.workers.checkpoint.layout.layout import align
from stager.workers.checkpoint.layout.layout_plan import objects_to_json
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import Extent, WriteTask
from stager.workers.memory.fill_marks import WHOLE_ALREADY, FillMarks
from stager.workers.memory.slab import Slab


class SlabWriter:
    """Writes plans and objects into slabs. A slab that still holds the plan, from the save before, keeps it.

    Copying the plan is most of the work for a state of many small tensors.
    """

    def __init__(self) -> None:
        self._plans: weakref.WeakKeyDictionary[Slab, tuple[str, int]] = weakref.WeakKeyDictionary()

    def begin(self, pieces: Pieces, slab: Slab) -> None:
        """Tell that tensors are about to be copied into ``slab``, which overwrites another plan that is there."""
        if self._plans.get(slab) != (pieces.plan.plan_id, pieces.plan_offset):
            self._plans.pop(slab, None)

    def write(
        self,
        spec: SaveSpec,
        pieces: Pieces,
        piece: Piece,
        slab: Slab,
        live_slabs: frozenset[str],
        marks: FillMarks = WHOLE_ALREADY,
        sidecars: Sequence[bytes] = (),
    ) -> WriteTask:
        """Add plan, objects and sidecars to a slab. The tensors of ``piece`` may follow: the marks say how many are there.

        Args:
            live_slabs: ids of the slabs that the trainer still has.
            sidecars: the files' bytes, for the piece that has part 0.
        """
        for offset, data in blobs_of(piece, pieces.items, pieces.blobs):
            put(slab, offset, data)
        plan = Extent(pieces.plan_offset, len(pieces.plan.document))
        key = pieces.plan.plan_id, plan.offset
        if self._plans.get(slab) != key:
            put(slab, plan.offset, pieces.plan.document)
            self._plans[slab] = key
        behind = max(plan.offset + plan.nbytes, piece.nbytes)
        objects = put(slab, align(behind), objects_to_json(pieces.items))
        files = put(slab, objects.offset + objects.nbytes, b"".join(sidecars))
        plan_id, start = pieces.plan.plan_id, piece.start
        return WriteTask(spec, slab, plan, plan_id, objects, live_slabs, start, marks=marks, sidecars=files)


def put(slab: Slab, offset: int, data: bytes) -> Extent:
    """Copy ``data`` to a place of the slab."""
    slab.view[offset : offset + len(data)] = data
    return Extent(offset, len(data))
