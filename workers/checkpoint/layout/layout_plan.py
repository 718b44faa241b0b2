"""The layout plan: the part of a layout that stays the same from save to save.

A layout can have a million items, too many for a message. So it lies in the slab behind the data, as two JSON documents: the
*plan* (tensors, structure; the format's templates follow it), and the *objects*, whose sizes change.

NOTE [ Once per plan ]
From save to save the tensors of a layout stay the same; only the objects behind them change their sizes. So everything that
depends on the tensors alone is worked out once, where it can be:

    1. trainer, when the structure of the state changes (``stager.state.snapshot_plan``): the layout plan, and the format's
       *templates*: bytes that only torch can make. Both go into the slab as one document.
    2. worker, at the first save of the plan: parses the document (``write_task.read_layout``). The plan gets one
       ``PlanCache``; every layout that is made of the plan shares it.
    3. worker, in later saves, by ``PlanCache.once_per_plan``: the manifest's rows, DCP's index, the header and tail of each
       small tensor. By ``PlanCache.until_changed``, what also depends on the objects' sizes: ends of spans, partition.

A save record holds no templates. After a crash another version of stager or torch may read the record, and bytes from a disk
must not get into the pickle that ``.metadata`` is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stager.workers.checkpoint.layout.items import Item, Items, column
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, PlanCache, Templates
from stager.workers.checkpoint.layout.layout_check import check_count, items_of_rows
from stager.workers.checkpoint.layout.structure import Node


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """The part of a layout that does not depend on the pickled objects.

    Attributes:
        files: the tensor files.
        object_file: name of the file of the objects. If it is the last tensor file's, objects go to the end of that file.
        tensors: items, in file order.
        structure: its leaves number the tensors first, then the objects.
        segment_bytes: the most bytes that one hash covers.
        templates: the format's templates; None: whoever needs them makes them, with torch.
        cache: what was worked out for this plan.
    """

    files: tuple[FileSpec, ...]
    object_file: str
    tensors: Items
    structure: Node
    segment_bytes: int
    templates: Templates | None = None
    cache: PlanCache = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", PlanCache(len(self.tensors), self.templates, is_of_plan=True))

    def to_document(self) -> bytes:
        """Serialise the plan, a line of JSON, and its templates, as a slab has them. A save record has the first line."""
        document = {
            "files": [[f.name, f.nbytes] for f in self.files],
            "object_file": self.object_file,
            **self.tensors.to_document(),
            "structure": self.structure,
            "segment_bytes": self.segment_bytes,
        }
        return b"%b\n%b" % (_compact(document), templates_to_bytes(self.templates or {}))

    @staticmethod
    def from_document(data: bytes) -> LayoutPlan:
        """Parse what :meth:`to_document` wrote."""
        text, _, made = data.partition(b"\n")
        return LayoutPlan.from_body(json.loads(text), templates_from_bytes(made))

    @staticmethod
    def from_body(document: dict[str, Any], made: Templates | None = None) -> LayoutPlan:
        """Make the plan of the parsed first line of :meth:`to_document`, with the templates that were ``made`` for it."""
        return LayoutPlan(
            files=tuple(FileSpec(*entry) for entry in document["files"]),
            object_file=document["object_file"],
            tensors=_tensors_of(document),
            structure=document["structure"],
            segment_bytes=document["segment_bytes"],
            templates=made,
        )

    @property
    def object_place(self) -> tuple[int, int]:
        """Where the objects begin: the index of the file, and the offset in it."""
        if self.files and self.files[-1].name == self.object_file:
            return len(self.files) - 1, self.files[-1].nbytes
        return len(self.files), 0

    def with_objects(self, objects: Sequence[Item]) -> Layout:
        """Return the whole layout: the tensors, then ``objects`` (the last of them the trailer, if the format has one)."""
        files = self.files
        if objects:
            end = objects[-1].offset + objects[-1].nbytes
            files = (*files[: self.object_place[0]], FileSpec(self.object_file, end))
        items = self.tensors.followed_by(objects)
        return Layout(files, items, self.structure, self.segment_bytes).with_cache(self.cache)


def _tensors_of(document: dict[str, Any]) -> Items:
    if "rows" not in document:
        return Items.from_document(document)
    # A save record or a replica of the first version. The last value of a row is the place in the slab.
    items, places = items_of_rows(document["rows"])
    return items.in_slab(column([check_count(place) for place in places]))


def objects_to_json(objects: Sequence[Item]) -> bytes:
    """Serialise the objects' items, as they lie in the slab and in a save record."""
    return _compact(_rows(objects))


def _rows(items: Sequence[Item]) -> list[list[Any]]:
    return [[*item.to_row(), item.slab_offset] for item in items]


def _compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def templates_to_bytes(templates: Templates) -> bytes:
    """Serialise templates: ``{name: [length of each piece, ...]}`` as a line of JSON, then all pieces."""
    nbytes = {name: list(map(len, pieces)) for name, pieces in templates.items()}
    return b"\n".join((json.dumps(nbytes).encode(), b"".join(itertools.chain.from_iterable(templates.values()))))


def templates_from_bytes(data: bytes) -> Templates:
    """Return what :func:`templates_to_bytes` was given."""
    head, _, body = data.partition(b"\n")
    templates: dict[str, tuple[bytes, ...]] = {}
    position = 0
    for name, nbytes in json.loads(head).items():
        ends = list(itertools.accumulate(nbytes, initial=position))
        templates[name] = tuple(body[start:end] for start, end in itertools.pairwise(ends))
        position = ends[-1]
    return templates
