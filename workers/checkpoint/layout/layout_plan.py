"""The part of a layout that stays the same from save to save: it is parsed once, and kept.

A layout can have hundreds of thousands of items, too many for a message. So it lies in the slab behind the data, as two JSON
documents: the *plan* (tensors, structure), and the *objects*, whose sizes change. The format's templates
(``templates.py``) come with the plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stager.workers.checkpoint.layout import templates
from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout
from stager.workers.checkpoint.layout.plan_cache import Memo
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.checkpoint.layout.templates import Templates


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """The part of a layout that does not depend on the pickled objects.

    Attributes:
        files: the tensor files.
        object_file: name of the objects' file. If it is that of the last tensor file, objects go to the end of that one.
        tensors: items, in file order.
        structure: its leaves number the tensors first, then the objects.
        segment_bytes: see :class:`stager.workers.checkpoint.layout.layout.Layout`.
        templates: the format's; None: whoever needs them makes them.
        memo: what was worked out for it.
    """

    files: tuple[FileSpec, ...]
    object_file: str
    tensors: tuple[Item, ...]
    structure: Node
    segment_bytes: int
    templates: Templates | None = None
    memo: Memo = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memo", Memo(len(self.tensors), self.templates))

    def to_json(self) -> bytes:
        document = {
            "files": [[f.name, f.nbytes] for f in self.files],
            "object_file": self.object_file,
            "rows": [[*item.to_row(), item.slab_offset] for item in self.tensors],
            "structure": self.structure,
            "segment_bytes": self.segment_bytes,
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def to_document(self) -> bytes:
        """As it lies in a slab, templates included."""
        return b"%b\n%b" % (self.to_json(), templates.to_bytes(self.templates or {}))

    @staticmethod
    def from_document(data: bytes) -> LayoutPlan:
        """What :meth:`to_document` wrote."""
        text, _, made = data.partition(b"\n")
        return LayoutPlan.from_body(json.loads(text), templates.from_bytes(made))

    @staticmethod
    def from_body(document: dict[str, Any], made: Templates | None = None) -> LayoutPlan:
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
        """Where objects begin: which file, and the offset in it."""
        if self.files and self.files[-1].name == self.object_file:
            return len(self.files) - 1, self.files[-1].nbytes
        return len(self.files), 0

    def with_objects(self, objects: Sequence[Item]) -> Layout:
        """The whole layout: the objects, and the frame if there is one, come behind the tensors."""
        if not objects:
            return Layout(self.files, self.tensors, self.structure, self.segment_bytes).sharing(self.memo)
        last = objects[-1]
        tensor_files = self.files[: self.object_place[0]]
        object_file = FileSpec(self.object_file, last.offset + last.nbytes)
        items = (*self.tensors, *objects)
        return Layout((*tensor_files, object_file), items, self.structure, self.segment_bytes).sharing(self.memo)


def objects_to_json(objects: Sequence[Item]) -> bytes:
    return json.dumps([[*item.to_row(), item.slab_offset] for item in objects], separators=(",", ":")).encode()
