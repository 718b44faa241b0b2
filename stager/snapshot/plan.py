"""The plan of a snapshot: which bytes are copied where in the slab, and where they go in the checkpoint's files.

A plan depends on the structure and on each tensor's address, dtype, shape, stride and device, and on nothing else. It is
kept as long as those are the same, which is checked in full on every save; it is never assumed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from stager.snapshot.fingerprint import Fingerprint, Fingerprints, read_fingerprints
from stager.snapshot.flatten import Flat
from stager.snapshot.placement import (
    Copy,
    Placement,
    Row,
    contiguous_stride,
    is_dense,
    place,
    place_in_order,
    span_nbytes,
)
from workers.errors import UnstageableError
from workers.formats import Format
from workers.job import Plan
from workers.layout import FileSpec, Item, align
from workers.structure import Node

__all__ = ["Copy", "Planner", "SnapshotPlan"]

_SMALLEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """Attributes:
    copies: what to copy, in slab order.
    objects: leaves that are pickled.
    nbytes: of the tensors in the slab.
    layout: what the workers need.
    document: ``layout`` as JSON.
    plan_id: hash of the document.
    leaves: which leaves are tensors; the next three are in this order.
    addresses, devices: of each tensor; ``devices`` is None when all are in host memory.
    spans: bytes that each tensor reaches over.
    """

    copies: tuple[Copy, ...]
    objects: tuple[int, ...]
    nbytes: int
    layout: Plan
    document: bytes
    plan_id: str
    leaves: tuple[int, ...]
    addresses: tuple[int, ...]
    devices: tuple[torch.device, ...] | None
    spans: tuple[int, ...]

    @property
    def num_tensors(self) -> int:
        """Items that are tensors; the objects come after them."""
        return len(self.layout.tensors)

    @property
    def num_files(self) -> int:
        return len(self.layout.files)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An item to be: its row, and what it looks like in the file. ``head``, ``data``, ``blob`` are lengths in bytes."""

    row: Row
    dtype: str
    stride: tuple[int, ...]
    head: int
    data: int
    blob: int


class Planner:
    """Makes plans, and keeps the last one.

    Args:
        file_format: on-disk format.
        num_files: at most so many tensor files.
        segment_bytes: see :class:`workers.layout.Layout`.
        rank: of this process in the job; part of the file names.
        in_order: the slab keeps to the files' order, for a snapshot that is staged in pieces.
    """

    def __init__(
        self, file_format: Format, num_files: int, segment_bytes: int, rank: int = 0, *, in_order: bool = False
    ) -> None:
        self._format = file_format
        self._num_files = num_files
        self._segment_bytes = segment_bytes
        self._rank = rank
        self._in_order = in_order
        self._prints: Fingerprints | None = None
        self._key: tuple[Node, list[tuple[Any, ...]], int] | None = None
        self._plan: SnapshotPlan | None = None

    def plan(self, flat: Flat) -> SnapshotPlan:
        """The plan for this state: the last one if nothing that matters changed.

        Raises:
            UnstageableError: a tensor that cannot be snapshotted, with its key path; two leaves of one name.
        """
        key = (flat.structure, flat.odd_keys, len(flat.leaves))
        prints = read_fingerprints(flat, self._prints)
        if self._plan is None or prints is not self._prints or key != self._key:
            with _no_collection():
                self._plan = self._make(flat, prints.rows())
            self._prints, self._key = prints, key
        return self._plan

    def forget(self) -> None:
        self._plan = self._prints = self._key = None

    def _make(self, flat: Flat, rows: list[Row]) -> SnapshotPlan:
        flat.check_names()
        are_tensors = {leaf for leaf, _ in rows}
        objects = tuple(i for i in range(len(flat.leaves)) if i not in are_tensors)
        entries, item_of = self._entries(flat, rows)
        placement = place_in_order([entry.row for entry in entries]) if self._in_order else place(rows)
        items, files = self._lay_out(entries, placement)
        for number, leaf in enumerate(objects):
            item_of[leaf] = len(items) + number
        layout = Plan(
            files=files,
            object_file=self._format.object_file_name(self._rank),
            tensors=tuple(items),
            structure=_renumber(flat.structure, item_of),
            segment_bytes=self._segment_bytes,
        )
        document = layout.to_json()
        return SnapshotPlan(
            copies=placement.copies,
            objects=objects,
            nbytes=placement.nbytes,
            layout=layout,
            document=document,
            plan_id=xxhash.xxh3_128_hexdigest(document),
            leaves=tuple(leaf for leaf, _ in rows),
            addresses=tuple(p.address for _, p in rows),
            devices=tuple(p.device for _, p in rows) if any(p.device.type != "cpu" for _, p in rows) else None,
            spans=tuple(span_nbytes(p) for _, p in rows),
        )

    def _entries(self, flat: Flat, rows: Sequence[Row]) -> tuple[list[_Entry], dict[int, int]]:
        """The items to be, and each leaf's number among them. Leaves that are the same bytes seen the same way share one."""
        entries: list[_Entry] = []
        item_of: dict[int, int] = {}
        known: dict[Fingerprint | int, int] = {}
        for leaf, p in rows:
            identity = p if p.nbytes else leaf
            if identity not in known:
                known[identity] = len(entries)
                entries.append(self._frame(flat, leaf, p))
            item_of[leaf] = known[identity]
        return entries, item_of

    def _frame(self, flat: Flat, leaf: int, p: Fingerprint) -> _Entry:
        dtype = str(p.dtype).removeprefix("torch.")
        stride = p.stride if is_dense(p) else contiguous_stride(p.shape)
        try:
            head, tail = self._format.tensor_frame(dtype, tuple(p.shape), stride)
        except Exception as error:
            raise UnstageableError(flat.name(leaf), f"torch.save cannot write {dtype}: {error}") from error
        return _Entry((leaf, p), dtype, stride, len(head), p.nbytes, len(head) + p.nbytes + len(tail))

    def _lay_out(self, entries: Sequence[_Entry], placement: Placement) -> tuple[list[Item], tuple[FileSpec, ...]]:
        """Items in file order, dealt to files of about the same size."""
        total = sum(entry.blob for entry in entries)
        num_files = max(1, min(self._num_files, total // _SMALLEST_FILE_BYTES))
        items: list[Item] = []
        sizes = [0] * num_files
        file, done = 0, 0
        for entry in entries:
            while file < num_files - 1 and done * num_files >= total * (file + 1):
                file += 1
            offset = sizes[file]
            items.append(
                Item(
                    kind="tensor",
                    file=file,
                    offset=offset,
                    nbytes=entry.blob,
                    data_offset=offset + entry.head,
                    data_nbytes=entry.data,
                    dtype=entry.dtype,
                    shape=tuple(entry.row[1].shape),
                    stride=entry.stride,
                    slab_offset=placement.offsets[entry.row[0]],
                )
            )
            sizes[file] = align(offset + entry.blob)
            done += entry.blob
        used = [size for size in sizes if size]  # an empty file would have no span to hash
        names = [self._format.tensor_file_name(self._rank, i) for i in range(len(used))]
        numbering = {old: new for new, old in enumerate(i for i, size in enumerate(sizes) if size)}
        if len(used) < num_files:
            items = [replace(item, file=numbering[item.file]) for item in items]
        return items, tuple(map(FileSpec, names, used))


@contextmanager
def _no_collection() -> Iterator[None]:
    """A new plan makes many small objects and no garbage: looking for some in between doubles the time it takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _renumber(node: Node, item_of: dict[int, int]) -> Node:
    if type(node) is int:
        return item_of[node]
    position = 1 if node[0] == "list" else 2
    children = [_renumber(child, item_of) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]
