"""The layout plan: the part of a layout that stays the same from save to save.

A layout can have hundreds of thousands of items, too many for a message. So it lies in the slab behind the data, as two JSON
documents: the *plan* (tensors, structure; the format's templates follow it), and the *objects*, whose sizes change.
``plan_cache.py`` tells what is worked out once per plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout
from stager.workers.checkpoint.layout.plan_cache import PlanCache, Templates, templates_from_bytes, templates_to_bytes
from stager.workers.checkpoint.layout.structure import Node


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """The part of a layout that does not depend on the pickled objects.

    Attributes:
        files: the tensor files.
        object_file: name of the file of the objects. If it is the last tensor file's, objects go to the end of that file.
        tensors: items, in file order.
        structure: its leaves number the tensors first, then the objects.
        segment_bytes: see :class:`stager.workers.checkpoint.layout.layout.Layout`.
        templates: the format's templates; None: whoever needs them makes them, with torch.
        cache: what was worked out for this plan.
    """

    files: tuple[FileSpec, ...]
    object_file: str
    tensors: tuple[Item, ...]
    structure: Node
    segment_bytes: int
    templates: Templates | None = None
    cache: PlanCache = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", PlanCache(len(self.tensors), self.templates))

    def to_json(self) -> bytes:
        """Serialise the plan without its templates, as a save record has it."""
        document = {
            "files": [[f.name, f.nbytes] for f in self.files],
            "object_file": self.object_file,
            "rows": _rows(self.tensors),
            "structure": self.structure,
            "segment_bytes": self.segment_bytes,
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def to_document(self) -> bytes:
        """Serialise the plan and its templates, as a slab has them."""
        return b"%b\n%b" % (self.to_json(), templates_to_bytes(self.templates or {}))

    @staticmethod
    def from_document(data: bytes) -> LayoutPlan:
        """Parse what :meth:`to_document` wrote."""
        text, _, made = data.partition(b"\n")
        return LayoutPlan.from_body(json.loads(text), templates_from_bytes(made))

    @staticmethod
    def from_body(document: dict[str, Any], made: Templates | None = None) -> LayoutPlan:
        """Make the plan of a parsed :meth:`to_json`, with the templates that were ``made`` for it."""
        return LayoutPlan(
            files=tuple(FileSpec(*entry) for entry in document["files"]),
            object_file=document["object_file"],
            tensors=tuple(Item.from_row(row[:-1], row[-1]) for row in document["rows"]),
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
        return Layout(files, (*self.tensors, *objects), self.structure, self.segment_bytes).with_cache(self.cache)


def objects_to_json(objects: Sequence[Item]) -> bytes:
    """Serialise the objects' items, as they lie in the slab and in a save record."""
    return json.dumps(_rows(objects), separators=(",", ":")).encode()


def _rows(items: Sequence[Item]) -> list[list[Any]]:
    return [[*item.to_row(), item.slab_offset] for item in items]
