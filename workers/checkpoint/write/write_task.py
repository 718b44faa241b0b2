"""The write task: what a worker is sent. It fits a message, and with it workers finish a save without the trainer.

slab:  | tensor bytes ... | plan JSON, newline, templates | object bytes ... | objects JSON | sidecars |

Its save record is a file in the partial directory, which says what the rank contributes to the checkpoint. After a crash, a
commit needs save records and receipts, and nothing else. The key "facts" is version 0.1's name of the save spec.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from stager.workers.checkpoint.documents.envelope import seal_json, unseal
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.layout_check import check_layout, items_of_rows
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.storage.writing import PLAIN, Writing
from stager.workers.checkpoint.write.save_spec import SaveSpec, decode_spec, encode_spec
from stager.workers.errors import CorruptCheckpointError
from stager.workers.gc_pause import no_collection
from stager.workers.memory.attached import Memory
from stager.workers.memory.descriptor import Descriptor
from stager.workers.memory.fill_marks import WHOLE_ALREADY, FillMarks

_CACHED_PLANS = 2  # for states that are saved in turn; a plan takes some hundred bytes per tensor
_RECORD = re.compile(r"save-([0-9]{1,9})\.json")


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the slab."""

    offset: int
    nbytes: int


NOTHING = Extent(0, 0)


@dataclass(frozen=True, slots=True)
class WriteTask:
    """A save, as workers write it.

    Attributes:
        slab: the memory of the snapshot, or of one piece of it.
        plan, plan_id: where the layout plan lies, and its hash (equal plans are parsed once).
        objects: where the objects document lies.
        live_slabs: the slabs that the trainer still uses; workers unmap the others.
        base: the offset in the whole snapshot of the slab's first byte; 0 unless the slab has a later piece.
        marks: say how far the slab is filled. All but the tensors is there before any worker has the task.
        lock: on the run's directory; None: whoever calls the worker holds it, and waits.
        sidecars: where the bytes of ``spec.sidecars`` lie, one file behind the other.
    """

    spec: SaveSpec
    slab: Memory
    plan: Extent
    plan_id: str
    objects: Extent
    live_slabs: frozenset[str]
    base: int = 0
    writing: Writing = PLAIN
    marks: FillMarks = WHOLE_ALREADY
    lock: Descriptor | None = None
    sidecars: Extent = NOTHING


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


def record_name(rank: int) -> str:
    """Return the name of a rank's save record."""
    return f"save-{rank}.json"


def recorded_ranks(names: Iterable[str]) -> list[int]:
    """Return the ranks whose save record is among ``names``, the files of a partial directory."""
    return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))


def to_record(task: WriteTask) -> bytes:
    """Serialise a task without its memory, sealed."""
    spec = encode_spec(task.spec)
    del spec["directory"]  # it may be mounted elsewhere by then
    head = json.dumps(spec, separators=(",", ":")).encode()
    plan, _, _ = read_extent(task, task.plan).partition(b"\n")
    return seal_json(b'{"facts":%b,"plan":%b,"objects":%b}' % (head, plan, read_extent(task, task.objects)))


def from_record(data: bytes, path: str, directory: str) -> tuple[SaveSpec, Layout]:
    """Parse what :func:`to_record` wrote.

    Raises:
        CorruptCheckpointError: ``path`` is not such a record.
    """
    body = unseal(data, path)
    try:
        spec = decode_spec(body["facts"], directory=directory)
        objects, _ = items_of_rows(body["objects"])
        layout = LayoutPlan.from_body(body["plan"]).with_objects(objects)
        check_layout(layout, of_one_rank=spec.num_ranks > 1)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(
            path, f"is damaged: it does not say what a rank contributes to the checkpoint ({error!r})"
        ) from error
    return spec, layout
