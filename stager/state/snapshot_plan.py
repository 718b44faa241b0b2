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

from stager.state.fingerprint import Fingerprint, Fingerprints, read_fingerprints
from stager.state.flatten import StateTree
from stager.state.grouping import by_role
from stager.state.placement import (
    LARGE_BYTES,
    Copy,
    Row,
    is_dense,
    place,
    place_in_order,
    span_nbytes,
)
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.formats.contract import Split, TensorSpec, Trailer, evenly
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.layout import Item, contiguous_stride
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.structure import ABSENT, Node

__all__ = ["Copy", "Planner", "SnapshotPlan"]


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """Attributes:
    copies: what to copy, in slab order.
    objects: leaves that are pickled.
    nbytes: of the tensors in the slab.
    layout: what the workers need.
    document: ``layout`` as it lies in a slab.
    plan_id: hash of the document.
    trailer: makes the blobs that follow the pickled objects: the format's trailer, or none.
    leaves: which leaves are tensors; the next three are in this order.
    addresses, devices: of each tensor; ``devices`` is None when all are in host memory.
    spans: bytes that each tensor reaches over.
    has_slices: some may be rows of a tensor, of which other ranks write the rest.
    """

    copies: tuple[Copy, ...]
    objects: tuple[int, ...]
    nbytes: int
    layout: LayoutPlan
    document: bytes
    plan_id: str
    trailer: Trailer
    leaves: tuple[int, ...]
    addresses: tuple[int, ...]
    devices: tuple[torch.device, ...] | None
    spans: tuple[int, ...]
    has_slices: bool = False

    @property
    def num_tensors(self) -> int:
        """Items that are tensors; the objects come after them."""
        return len(self.layout.tensors)

    def closed(self, blobs: list[bytes]) -> list[bytes]:
        """The pickled objects, and what the format puts behind them, if anything."""
        return [*blobs, *self.trailer(blobs)]


class Planner:
    """Makes plans, and keeps the last one.

    Args:
        file_format: on-disk format.
        num_files: at most so many tensor files, if the format has more than one.
        segment_bytes: see :class:`stager.workers.checkpoint.layout.layout.Layout`.
        rank: of this process in the job; part of the file names.
        in_order: the slab keeps to the files' order, for a snapshot that is staged in pieces.
        incremental: many files, of tensors that are likely to change together (``grouping.py``), instead of ``num_files``.
    """

    def __init__(
        self,
        file_format: Format,
        num_files: int,
        segment_bytes: int,
        rank: int = 0,
        *,
        in_order: bool = False,
        incremental: bool = False,
    ) -> None:
        self._format = file_format
        self._split: Split = by_role if incremental else evenly(num_files)
        self._segment_bytes = segment_bytes
        self._rank = rank
        self._in_order = in_order
        self._prints: Fingerprints | None = None
        self._key: tuple[Node, list[tuple[Any, ...]], int] | None = None
        self._plan: SnapshotPlan | None = None

    def plan(self, flat: StateTree) -> SnapshotPlan:
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

    def _make(self, flat: StateTree, rows: list[Row]) -> SnapshotPlan:
        flat.check_names()
        foreign = [(leaf, p) for leaf, p in rows if not self._format.holds(name_of(p.dtype))]
        rows = [(leaf, p) for leaf, p in rows if self._format.holds(name_of(p.dtype))] if foreign else rows
        if self._format.row_major:
            rows = [(leaf, p if _is_row_major(p) else replace(p, is_lazy=True)) for leaf, p in rows]
        same_as = {leaf: group[0][0] for group in _group(foreign) for leaf, _ in group[1:]}  # tied: one object
        no_objects = {leaf for leaf, _ in rows} | same_as.keys()
        objects = tuple(i for i in range(len(flat.leaves)) if i not in no_objects)
        groups = _group(rows)
        laid_out = self._format.lay_out([_spec(flat, group) for group in groups], self._rank, self._split)
        in_order = [groups[number] for number in laid_out.order]
        file_offsets = {
            leaf: item.data_offset
            for item, group in zip(laid_out.items, in_order, strict=True)
            if item.data_nbytes >= LARGE_BYTES
            for leaf, _ in group
        }
        if self._in_order:
            placement = place_in_order([group[0] for group in in_order], file_offsets)
        else:
            placement = place(rows, file_offsets)
        items = [
            replace(item, slab_offset=placement.offsets[group[0][0]])
            for item, group in zip(laid_out.items, in_order, strict=True)
        ]
        item_of = {leaf: number for number, group in enumerate(in_order) for leaf, _ in group}
        for number, leaf in enumerate(objects):
            item_of[leaf] = len(items) + number
        for leaf, first in same_as.items():
            item_of[leaf] = item_of[first]
        layout = LayoutPlan(
            files=laid_out.files,
            object_file=self._format.object_file_name(self._rank),
            tensors=tuple(items),
            structure=_renumber(flat.structure, item_of),
            segment_bytes=self._segment_bytes,
            templates=self._format.templates([*items, *_of_others(flat)]),
        )
        document = layout.to_document()
        return SnapshotPlan(
            copies=placement.copies,
            objects=objects,
            nbytes=placement.nbytes,
            layout=layout,
            document=document,
            plan_id=xxhash.xxh3_128_hexdigest(document),
            trailer=self._format.trailer(layout),
            leaves=tuple(leaf for leaf, _ in rows),
            addresses=tuple(p.address for _, p in rows),
            devices=tuple(p.device for _, p in rows) if any(p.device.type != "cpu" for _, p in rows) else None,
            spans=tuple(span_nbytes(p) for _, p in rows),
            has_slices=bool(flat.kinds),
        )


def _group(rows: Sequence[Row]) -> list[list[Row]]:
    """Leaves that are the same bytes seen the same way become one item."""
    groups: list[list[Row]] = []
    known: dict[Fingerprint | int, int] = {}
    for row in rows:
        leaf, p = row
        identity = p if p.nbytes else leaf
        if identity not in known:
            known[identity] = len(groups)
            groups.append([])
        groups[known[identity]].append(row)
    return groups


def _spec(flat: StateTree, group: list[Row]) -> TensorSpec:
    p = group[0][1]
    stride = p.stride if is_dense(p) else contiguous_stride(p.shape)
    return TensorSpec(tuple(flat.paths[leaf] for leaf, _ in group), name_of(p.dtype), tuple(p.shape), stride)


def _is_row_major(p: Fingerprint) -> bool:
    """Otherwise it is copied as what has no bytes of its own to copy: element by element."""
    return p.stride == contiguous_stride(p.shape)


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


def _of_others(flat: StateTree) -> list[Item]:
    """Whoever commits describes what other ranks wrote, too: a stand-in for each kind of it."""
    return [Item("tensor", 0, 0, 0, 0, 0, dtype, (0,) * dims, (1,) * dims) for dtype, dims in sorted(flat.kinds)]


def _renumber(node: Node, item_of: dict[int, int]) -> Node:
    if type(node) is int:
        return item_of[node]
    if node is ABSENT:
        return ABSENT
    if node[0] == "chunks":
        return [*node[:2], [[offsets, item_of[leaf]] for offsets, leaf in node[2]]]
    position = 1 if node[0] == "list" else 2
    children = [_renumber(child, item_of) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]
