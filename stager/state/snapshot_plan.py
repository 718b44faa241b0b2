"""The plan of a snapshot: which bytes are copied where in the slab, and where they go in the checkpoint's files.

A plan depends on the structure and on each tensor's address, dtype, shape, stride and device, and on nothing else. It is
kept as long as those are the same, which is checked in full on every save; it is never assumed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash

from stager.state.copies import Copies
from stager.state.fingerprint import Fingerprints, TensorMemory, read_fingerprints
from stager.state.grouping import by_role
from stager.state.placement import LARGE_BYTES, place, place_in_order
from stager.state.state_tree import StateTree
from stager.state.tensor_table import TensorTable
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.formats.contract import Split, TensorSpec, TensorSpecs, Trailer, evenly
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.items import ItemKind, column
from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from stager.workers.checkpoint.layout.structure import Chunks, Node, map_leaves
from stager.workers.checkpoint.layout.tensor_node import TensorNode
from stager.workers.errors import UnstageableError
from stager.workers.gc_pause import no_collection

__all__ = ["Planner", "SnapshotPlan"]

_LARGEST = (1 << 63) - 1


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

    copies: Copies
    objects: tuple[int, ...]
    nbytes: int
    layout: LayoutPlan
    document: bytes
    plan_id: str
    trailer: Trailer
    leaves: Sequence[int]
    addresses: Sequence[int]
    devices: tuple[torch.device, ...] | None
    spans: Sequence[int]
    dense: bytes
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
                self._last_plan = self._make(tree, fingerprints.table())
            self._last_fingerprints, self._last_key = fingerprints, key
        return self._last_plan, memory

    def forget(self) -> None:
        """Drop the last plan."""
        self._last_plan = self._last_fingerprints = self._last_key = None

    def _make(self, tree: StateTree, table: TensorTable) -> SnapshotPlan:
        _refuse_too_large(tree, table)
        # 1. Which tensors the format stores as tensors, and which of these are one item.
        is_held = table.of_each(lambda kind: self._format.holds(name_of(kind.dtype))).astype(bool)
        foreign = table.where(~is_held)
        table = table.where(is_held)
        tied, tied_foreign = _tied(table), _tied(foreign)
        is_first = np.ones(len(table), dtype=bool)
        is_first[[row for group in tied for row in group[1:]]] = False
        firsts = np.flatnonzero(is_first)  # a row for each item
        # 2. Which of them are copied element by element.
        is_dense = table.of_each(lambda kind: kind.is_dense).astype(bool) & ~table.lazy
        is_row_major = table.of_each(lambda kind: kind.is_row_major).astype(bool)
        is_packed = ~is_dense | (~is_row_major if self._format.row_major else False)
        # 3. Where everything goes: in the files, then in the slab.
        laid_out = self._format.lay_out(_specs(tree, table, firsts, ~is_packed, tied), self._rank, self._split)
        in_order = firsts[np.asarray(laid_out.order, dtype=np.int64)]
        sizes, data_offsets = np.array(laid_out.items.data_nbytes), np.array(laid_out.items.data_offset)
        file_offsets = np.full(len(table), -1)
        file_offsets[in_order] = np.where(sizes >= LARGE_BYTES, data_offsets, -1)
        for group in tied:
            file_offsets[group] = file_offsets[group[0]]
        placement = (
            place_in_order(table, in_order, file_offsets, is_packed)
            if self._in_order
            else place(table, file_offsets, is_packed)
        )
        items = laid_out.items.in_slab(column(placement.offsets[in_order]))
        # 4. The structure names items: the tensors, then the objects.
        item_of = np.full(len(tree.leaves), -1)
        item_of[table.leaves[in_order]] = np.arange(len(in_order))
        groups = [table.leaves[group].tolist() for group in tied]
        foreign_groups = [foreign.leaves[group].tolist() for group in tied_foreign]
        for first, *others in groups:
            item_of[others] = item_of[first]
        is_object = item_of < 0
        is_object[[leaf for group in foreign_groups for leaf in group[1:]]] = False
        objects = np.flatnonzero(is_object)
        item_of[objects] = np.arange(len(items), len(items) + len(objects))
        for first, *others in foreign_groups:
            item_of[others] = item_of[first]
        self._tied = [*groups, *foreign_groups]
        self._same_objects = _same_objects(tree.leaves, self._tied)
        flags: dict[int, dict[str, Any]] = {leaf: {"object": number} for leaf, number in self._same_objects.items()}
        if self._format.row_major:
            for row in np.flatnonzero(is_dense & ~is_row_major).tolist():
                flags.setdefault(int(table.leaves[row]), {})["stride"] = list(table.kinds[table.codes[row]].stride)
        layout = LayoutPlan(
            files=laid_out.files,
            object_file=self._format.object_file_name(self._rank),
            tensors=items,
            structure=_renumber(tree.structure, item_of, flags),
            segment_bytes=self._segment_bytes,
            templates=self._format.templates([*items.kinds, *_of_others(tree)]),
        )
        document = layout.to_document()
        return SnapshotPlan(
            copies=placement.copies,
            objects=tuple(objects.tolist()),
            nbytes=placement.nbytes,
            layout=layout,
            document=document,
            plan_id=xxhash.xxh3_128_hexdigest(document),
            trailer=self._format.trailer(layout),
            leaves=column(table.leaves),
            addresses=array("Q", table.addresses.tobytes()),
            devices=None if table.on_host.all() else tuple(table.devices[number] for number in table.on.tolist()),
            spans=column(table.of_each(lambda kind: kind.span_nbytes)),
            dense=table.of_each(lambda kind: kind.is_dense).astype(np.uint8).tobytes(),
            has_slices=bool(tree.kinds),
        )


def _refuse_too_large(tree: StateTree, table: TensorTable) -> None:
    """Refuse an expanded tensor whose elements would take more bytes than can be counted.

    Raises:
        UnstageableError
    """
    for code, kind in enumerate(table.kinds):
        if kind.nbytes > _LARGEST:
            leaf = int(table.leaves[np.flatnonzero(table.codes == code)[0]])
            reason = f"has {kind.nbytes:,} bytes if it is stored element by element; save the tensor that was expanded"
            raise UnstageableError(tree.name(leaf), reason)


def _tied(table: TensorTable) -> list[list[int]]:
    """Group the rows that are the same bytes, seen the same way (tied weights): each group becomes one item.

    Returns the groups of two rows or more.
    """
    rows = np.flatnonzero(table.of_each(lambda kind: kind.nbytes) > 0)
    _, position, times = np.unique(table.addresses[rows], return_inverse=True, return_counts=True)
    rows = rows[times[position] > 1]  # mostly none
    groups: dict[Any, list[int]] = {}
    for row, identity in zip(rows.tolist(), table.identities(rows), strict=True):
        groups.setdefault(identity, []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def _specs(tree: StateTree, table: TensorTable, firsts: Any, as_it_is: Any, tied: list[list[int]]) -> TensorSpecs:
    """Tell the format what the items are.

    Args:
        firsts: for each item, the first of the rows that are this item.
        as_it_is: for each row of the table, whether its memory is stored as it is, and not in C order.
        tied: the rows of the items that have several.
    """
    of_first = {group[0]: group for group in tied}
    kinds: dict[ItemKind, int] = {}
    pairs = 2 * table.codes[firsts] + as_it_is[firsts]
    numbers = np.zeros(2 * len(table.kinds), dtype=np.int64)
    for pair in dict.fromkeys(pairs.tolist()):
        kind = table.kinds[pair // 2]
        stride = kind.stride if pair % 2 else contiguous_stride(kind.shape)
        item_kind = ItemKind("tensor", name_of(kind.dtype), tuple(kind.shape), stride)
        numbers[pair] = kinds.setdefault(item_kind, len(kinds))
    item_codes, listed = numbers[pairs], tuple(kinds)

    def spec(index: int) -> TensorSpec:
        row = int(firsts[index])
        leaves = table.leaves[of_first.get(row, [row])].tolist()
        paths, names = (tuple(each[leaf] for leaf in leaves) for each in (tree.paths, tree.names))
        _, dtype, shape, stride = listed[item_codes[index]]
        return TensorSpec(paths, names, dtype, shape, stride)

    return TensorSpecs(listed, item_codes, spec)


def _of_others(tree: StateTree) -> list[ItemKind]:
    """Make a stand-in for each kind of tensor that other ranks write: the rank that commits describes those, too."""
    return [ItemKind("tensor", dtype, (0,) * dims, (1,) * dims) for dtype, dims in sorted(tree.kinds)]


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


def _renumber(structure: Node, item_of: Any, flags: dict[int, dict[str, Any]]) -> Node:
    """Let the structure name items, not leaves, and add flags to leaves."""
    if not flags and np.array_equal(item_of, np.arange(len(item_of))):
        return structure
    numbers: list[int] = item_of.tolist()

    def renumbered(leaf: int | Chunks) -> Node:
        if isinstance(leaf, Chunks):
            parts = tuple((offsets, numbers[index]) for offsets, index in leaf.parts)
            named = {name: value for name, value in flags.get(leaf.parts[0][1], {}).items() if name == "object"}
            return TensorNode(replace(leaf, parts=parts).to_node(), named, []).to_node()
        return numbers[leaf] if leaf not in flags else TensorNode(numbers[leaf], flags[leaf], []).to_node()

    return map_leaves(structure, renumbered)
