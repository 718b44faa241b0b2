"""The save record: a rank's file in the partial directory, which says what the rank contributes to the checkpoint.

After a crash, a commit needs save records and receipts, and nothing else. The key "facts" is version 0.1's name of the save
spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict

from stager.workers.checkpoint.directory.envelope import seal_json, unseal
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.write.save_spec import SaveSpec, check_spec
from stager.workers.checkpoint.write.write_task import WriteTask, read_extent
from stager.workers.errors import CorruptCheckpointError

_RECORD = re.compile(r"save-([0-9]{1,9})\.json")


def record_name(rank: int) -> str:
    """Return the name of a rank's save record."""
    return f"save-{rank}.json"


def recorded_ranks(names: Iterable[str]) -> list[int]:
    """Return the ranks whose save record is among ``names``, the files of a partial directory."""
    return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))


def to_record(task: WriteTask) -> bytes:
    """Serialise a task without its memory, sealed."""
    spec = asdict(task.spec)
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
        spec = check_spec(SaveSpec(directory=directory, **body["facts"]))
        objects = [Item.from_row(row[:-1]) for row in body["objects"]]
        layout = LayoutPlan.from_body(body["plan"]).with_objects(objects)
        check_layout(layout, of_one_rank=spec.num_ranks > 1)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"is not a valid save record: {error!r}") from error
    return spec, layout
