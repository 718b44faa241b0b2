"""The plan of a snapshot: which bytes are copied where in the slab, and where they go in the checkpoint's files.

A plan depends on the structure and on each tensor's address, dtype, shape, stride and device, and on nothing else. It is
kept as long as those are the same, which is checked in full on every save; it is never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from stager.state.fingerprint import Fingerprint, Fingerprints, TensorMemory, read_fingerprints
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
from stager.state.state_tree import StateTree
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.formats.contract import Split, TensorSpec, Trailer, evenly
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.layout import Item, contiguous_stride
from stager.workers.checkpoint.layout.layout import is_dense as is_dense_stride
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.structure import Chunks, Node, map_leaves
from stager.workers.checkpoint.layout.tensor_node import TensorNode
from stager.workers.gc_pause import no_collection

__all__ = ["Copy", "Planner", "SnapshotPlan"]


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """The trainer's side of a plan: what to copy where in the slab. Its ``layout`` is the workers' side.

    Attributes:
        copies: what to copy, in slab order.
        objects: numbers of the leaves that are pickled.
        nbytes: bytes of the tensors in the slab.
        layout: where items lie in the files; what the workers need.
        document: ``layout`` as it lies in a slab.
        plan_id: hash of the document.
        trailer: makes the blobs that follow the pickled objects: the format's trailer, or none.
        leaves: numbers of the leaves that are tensors. The next four are in this order.
        addresses, devices: of each tensor; ``devices`` is None when all are in host memory.
        spans: bytes from the first to the last byte of each tensor.
        dense: of each tensor, whether its elements fill its span and share no memory.
        has_slices: whether some tensors may be rows of a larger one, of which other ranks write the rest.
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
    dense: tuple[bool, ...]
    has_slices: bool = False

    @property
    def num_tensors(self) -> int:
        """Items that are tensors; the objects come after them."""
        return len(self.layout.tensors)

    def with_trailer(self, blobs: list[bytes]) -> list[bytes]:
        """Add the format's trailer, if it has one, to the pickled objects."""
        return [*blobs, *self.trailer(blobs)]


class Planner:
    """Makes plans, and keeps the last one for as long as it holds.

    Args:
        file_format: on-disk format.
        num_files: the most tensor files to make, if the format can have more than one.
        segment_bytes: see :class:`stager.workers.checkpoint.layout.layout.Layout`.
        rank: of this process in the job; part of the file names.
        in_order: keep the slab in the files' order, for a snapshot that is staged in several pieces.
        incremental: make many files, each of tensors that are likely to change together (``grouping.py``).
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
        self._split: Split = by_role if incremental else evenly(num_files)  # which tensors share a file
        self._segment_bytes = segment_bytes
        self._rank = rank
        self._in_order = in_order
        # The last plan, and what it was made for: the tensors' fingerprints, the structure with its odd keys and number of
        # leaves, the leaves that are one item each, and which of these are one tensor object.
        self._last_plan: SnapshotPlan | None = None
        self._last_fingerprints: Fingerprints | None = None
        self._last_key: tuple[Node, list[tuple[Any, ...]], int] | None = None
        self._tied: list[list[int]] = []
        self._same_objects: dict[int, int] = {}

    def plan(self, tree: StateTree) -> SnapshotPlan:
        """Return the plan for this state. See :meth:`plan_and_hold`."""
        return self.plan_and_hold(tree)[0]

    def plan_and_hold(self, tree: StateTree) -> tuple[SnapshotPlan, TensorMemory]:
        """Return the plan for this state: the last one, if no structure and no fingerprint has changed; and hold its memory.

        Raises:
            UnstageableError: a tensor that cannot be snapshotted, with its key path.
        """
        key = (tree.structure, tree.odd_keys, len(tree.leaves))
        # Every save makes some tuples for each tensor, most of which die at once. The collector would take their number for
        # a reason to look at all objects of the program: 0.3 s in the trainer's thread, now and then.
        with no_collection():
            # The same object, if none has changed.
            fingerprints, memory = read_fingerprints(tree, self._last_fingerprints)
        if (
            self._last_plan is None
            or fingerprints is not self._last_fingerprints
            or key != self._last_key
            or _same_objects(tree.leaves, self._tied) != self._same_objects
        ):
            with no_collection():
                self._last_plan = self._make(tree, fingerprints.rows())
            self._last_fingerprints, self._last_key = fingerprints, key
        return self._last_plan, memory

    def forget(self) -> None:
        """Drop the last plan."""
        self._last_plan = self._last_fingerprints = self._last_key = None

    def _make(self, tree: StateTree, rows: list[Row]) -> SnapshotPlan:
        foreign = [(leaf, p) for leaf, p in rows if not self._format.holds(name_of(p.dtype))]
        rows = [(leaf, p) for leaf, p in rows if self._format.holds(name_of(p.dtype))] if foreign else rows
        permuted: dict[int, list[int]] = {}
        if self._format.row_major:
            permuted = {leaf: list(p.stride) for leaf, p in rows if is_dense(p) and not _is_row_major(p)}
            rows = [(leaf, p if _is_row_major(p) else replace(p, is_lazy=True)) for leaf, p in rows]
        same_as = {leaf: group[0][0] for group in _group(foreign) for leaf, _ in group[1:]}  # tied: one object
        no_objects = {leaf for leaf, _ in rows} | same_as.keys()
        objects = tuple(i for i in range(len(tree.leaves)) if i not in no_objects)
        groups = _group(rows)
        laid_out = self._format.lay_out([_spec(tree, group) for group in groups], self._rank, self._split)
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
        self._tied = [[leaf for leaf, _ in group] for group in [*groups, *_group(foreign)] if len(group) > 1]
        self._same_objects = _same_objects(tree.leaves, self._tied)
        flags: dict[int, dict[str, Any]] = {leaf: {"object": number} for leaf, number in self._same_objects.items()}
        for leaf, stride in permuted.items():
            flags.setdefault(leaf, {})["stride"] = stride
        layout = LayoutPlan(
            files=laid_out.files,
            object_file=self._format.object_file_name(self._rank),
            tensors=tuple(items),
            structure=_renumber(tree.structure, item_of, flags),
            segment_bytes=self._segment_bytes,
            templates=self._format.templates([*items, *_of_others(tree)]),
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
            dense=tuple(is_dense_stride(p.shape, p.stride) for _, p in rows),
            has_slices=bool(tree.kinds),
        )


def _group(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the leaves that are the same bytes, seen the same way (tied weights): each group becomes one item."""
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


def _spec(tree: StateTree, group: list[Row]) -> TensorSpec:
    p = group[0][1]
    stride = p.stride if is_dense(p) else contiguous_stride(p.shape)
    names = tuple(tree.names[leaf] for leaf, _ in group)
    return TensorSpec(tuple(tree.paths[leaf] for leaf, _ in group), names, name_of(p.dtype), tuple(p.shape), stride)


def _is_row_major(p: Fingerprint) -> bool:
    """A format that stores row-major tensors only needs all others copied element by element."""
    return p.stride == contiguous_stride(p.shape)


def _of_others(tree: StateTree) -> list[Item]:
    """Make a stand-in for each kind of tensor that other ranks write: the rank that commits describes those, too."""
    return [Item("tensor", 0, 0, 0, 0, 0, dtype, (0,) * dims, (1,) * dims) for dtype, dims in sorted(tree.kinds)]


def _same_objects(leaves: Sequence[Any], tied: Sequence[Sequence[int]]) -> dict[int, int]:
    """Find the leaves that are one tensor object, among those that are one item.

    Returns a number for each such leaf, the same for the same object; other tied leaves share memory only.
    """
    numbers: dict[int, int] = {}
    for group in tied:
        objects: dict[int, list[int]] = {}
        for leaf in group:
            objects.setdefault(id(leaves[leaf]), []).append(leaf)
        for number, same in enumerate(objects.values()):
            numbers.update((leaf, number) for leaf in same[1:] and same)
    return numbers


def _renumber(structure: Node, item_of: dict[int, int], flags: dict[int, dict[str, Any]]) -> Node:
    """Let the structure name items, not leaves, and add flags to leaves."""

    def renumbered(leaf: int | Chunks) -> Node:
        if isinstance(leaf, Chunks):
            parts = tuple((offsets, item_of[index]) for offsets, index in leaf.parts)
            numbers = {name: value for name, value in flags.get(leaf.parts[0][1], {}).items() if name == "object"}
            return TensorNode(replace(leaf, parts=parts).to_node(), numbers, []).to_node()
        return item_of[leaf] if leaf not in flags else TensorNode(item_of[leaf], flags[leaf], []).to_node()

    return map_leaves(structure, renumbered)
