"""One save as the workers see it: small enough for a message, complete enough to finish without the trainer.

The layout is too large for a message (hundreds of thousands of items), so it lies in the slab behind the data, as two JSON
documents: the *plan* (tensors, structure), which stays the same from save to save and is parsed once, and the *objects*,
whose sizes change. The format's templates (``templates.py``) come with the plan.

    slab:  | tensor bytes ... | plan JSON, newline, templates | object bytes ... | objects JSON |
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stager.workers.checkpoint.directory.envelope import seal_json, unseal
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout import templates
from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout
from stager.workers.checkpoint.layout.layout_check import check_count, check_layout, check_step, check_text, check_time
from stager.workers.checkpoint.layout.plan_cache import Memo, no_collection
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.checkpoint.layout.templates import Templates
from stager.workers.checkpoint.write.write_back import PLAIN, Writing
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.attached import Memory

_RECORD = re.compile(r"save-([0-9]{1,9})\.json")
_CACHED_PLANS = 2  # what is saved in turn; each takes about 1 KiB a tensor
_MAX_PARTS = 1 << 16
_MAX_RANKS = 1 << 24


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the slab."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """What a commit has to know beside the layout.

    Attributes:
        directory: of the run; absolute.
        step, save_id: which save; ``save_id`` is unique, a nonce.
        kind: the on-disk format.
        num_parts: how many parts this rank's share of the save is dealt into.
        fsync: sync files and directories before each rename.
        created: unix time of the snapshot.
        stager, torch: versions, for the manifest.
        whole_bytes: files up to this size are dealt whole (:func:`stager.workers.checkpoint.layout.layout.deal`); 0: the save is not incremental.
        base_step: the checkpoint whose files may be linked where nothing changed; None: there is none.
        full_every: of so many saves in a row, one is written without links.
        rank, num_ranks: whose share this is, of how many that make up the checkpoint.
    """

    directory: str
    step: int
    save_id: str
    kind: str
    num_parts: int
    fsync: bool
    created: float
    stager: str
    torch: str
    whole_bytes: int = 0
    base_step: int | None = None
    full_every: int = 0
    rank: int = 0
    num_ranks: int = 1

    @property
    def record_name(self) -> str:
        return record_name(self.rank)


def record_name(rank: int) -> str:
    """Of the file in the partial directory that says what a rank contributes."""
    return f"save-{rank}.json"


def recorded_ranks(names: Iterable[str]) -> list[int]:
    """The ranks whose record is among the names of a partial directory's files."""
    return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))


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


@dataclass(frozen=True, slots=True)
class Plan:
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
    def from_document(data: bytes) -> Plan:
        """What :meth:`to_document` wrote."""
        text, _, made = data.partition(b"\n")
        return Plan.from_body(json.loads(text), templates.from_bytes(made))

    @staticmethod
    def from_body(document: dict[str, Any], made: Templates | None = None) -> Plan:
        return Plan(
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


_plans: OrderedDict[str, Plan] = OrderedDict()


def read_layout(job: WriteTask) -> Layout:
    """The layout of a job, from its slab."""
    plan = _plans.get(job.plan_id)
    if plan is None:
        with no_collection():
            plan = _plans[job.plan_id] = Plan.from_document(_read(job, job.plan))
        while len(_plans) > _CACHED_PLANS:
            _plans.popitem(last=False)
    rows = json.loads(_read(job, job.objects))
    return plan.with_objects([Item.from_row(row[:-1], row[-1]) for row in rows])


def to_record(job: WriteTask) -> bytes:
    """The job without its memory, sealed: with the receipts, all that a commit after a crash needs."""
    spec = asdict(job.spec)
    del spec["directory"]  # it may be mounted elsewhere by then
    head = json.dumps(spec, separators=(",", ":")).encode()
    plan, _, _ = _read(job, job.plan).partition(b"\n")
    return seal_json(b'{"facts":%b,"plan":%b,"objects":%b}' % (head, plan, _read(job, job.objects)))


def from_record(data: bytes, path: str, directory: str) -> tuple[SaveSpec, Layout]:
    """What :func:`to_record` wrote.

    Raises:
        CorruptCheckpointError: ``path`` is not such a record.
    """
    body = unseal(data, path)
    try:
        spec = check_spec(SaveSpec(directory=directory, **body["facts"]))
        objects = [Item.from_row(row[:-1]) for row in body["objects"]]
        layout = Plan.from_body(body["plan"]).with_objects(objects)
        check_layout(layout, is_share=spec.num_ranks > 1)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"not the record of a save: {error!r}") from error
    return spec, layout


def check_spec(spec: SaveSpec) -> SaveSpec:
    """``spec``, when they can be those of a save.

    Raises:
        ValueError, TypeError
    """
    check_step(spec.step)
    check_time(spec.created)
    for text in (spec.save_id, spec.kind, spec.stager, spec.torch):
        check_text(text)
    if spec.kind not in FORMATS:
        raise ValueError(f"unknown format {spec.kind!r}")
    if not 1 <= check_count(spec.num_parts) <= _MAX_PARTS or type(spec.fsync) is not bool:
        raise ValueError("impossible facts")
    check_count(spec.whole_bytes)
    check_count(spec.full_every)
    if not 1 <= check_count(spec.num_ranks) <= _MAX_RANKS or check_count(spec.rank) >= spec.num_ranks:
        raise ValueError("impossible ranks")
    if spec.base_step is not None:
        check_step(spec.base_step)
    return spec


def _read(job: WriteTask, extent: Extent) -> bytes:
    return bytes(job.slab.view[extent.offset : extent.offset + extent.nbytes])
