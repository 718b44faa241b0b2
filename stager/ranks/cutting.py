"""Cutting leaves that several ranks hold into partitions of about the same number of bytes.

All these ranks cut the same leaves, in the same order, at the same places, so they agree without a message. A large tensor
is cut between rows. Anything else is written whole, by the rank whose partition has its middle.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from stager.ranks.agreement import Partition
from stager.state.shards import Shard
from stager.state.state_tree import StateTree

_CUT_BYTES = 1 << 20  # smaller parts of a tensor are not worth an item of their own


@dataclass(frozen=True, slots=True)
class WrittenLeaf:
    """What this rank writes of a leaf.

    Attributes:
        leaf: its number.
        rows: the half-open range [first, last) of rows; None: all of them.
        box: of a sharded tensor, the number of its box.
    """

    leaf: int
    rows: tuple[int, int] | None
    box: int = 0


@dataclass(slots=True)
class _Unit:
    """What is the same memory seen the same way (tied): one rank writes all of it.

    ``boxes``: (leaf, number of the box). ``shape``, ``nbytes``: of what this rank has. ``can_cut``: whether it may be cut
    between rows.
    """

    boxes: list[tuple[int, int]]
    shape: tuple[int, ...]
    nbytes: int
    can_cut: bool


def is_stored_raw(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored as its bytes, and not as a pickled object."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)


def cut_leaves(
    tree: StateTree,
    leaves: Sequence[int],
    partition: Partition,
    shards: Mapping[int, Shard | None],
    views: Mapping[int, Sequence[torch.Tensor]],
) -> list[WrittenLeaf]:
    """This rank's partition of leaves that ``partition.count`` ranks hold.

    Args:
        shards, views: of the sharded leaves, what this rank holds of each, and its memory.
    """
    units = _units(tree, leaves, shards, views)
    total, index, count = sum(unit.nbytes for unit in units), partition.index, partition.count
    low, high, is_last = total * index // count, total * (index + 1) // count, index == count - 1
    parts = []
    end = 0
    for unit in units:
        start, end = end, end + unit.nbytes
        rows: tuple[int, int] | None = None
        if not unit.nbytes:  # an object, or an empty tensor
            is_ours = index == 0
        elif unit.can_cut and count > 1:
            num_rows = unit.shape[0]
            row_nbytes = unit.nbytes // num_rows
            first = _row(low, start, row_nbytes, num_rows)
            last = num_rows if is_last else _row(high, start, row_nbytes, num_rows)
            is_ours = first < last
            rows = None if (first, last) == (0, num_rows) else (first, last)
        else:  # whole, to the rank that has its middle
            middle = (start + end) // 2
            is_ours = low <= middle < high or (is_last and middle >= high)
        if is_ours:
            parts += [WrittenLeaf(leaf, rows, box) for leaf, box in unit.boxes]
    return parts


def _row(boundary: int, start: int, row_nbytes: int, num_rows: int) -> int:
    """The row at which a tensor that starts at byte ``start`` is cut for a boundary between two ranks' bytes.

    No part is smaller than ``_CUT_BYTES``: near an end of the tensor, the cut moves to that end or away from it.
    """
    row = round((boundary - start) / row_nbytes)
    margin = -(-_CUT_BYTES // row_nbytes)
    if row < margin:
        return 0 if 2 * row < margin or num_rows < 2 * margin else margin
    if num_rows - row < margin:
        return num_rows if 2 * (num_rows - row) < margin or num_rows < 2 * margin else num_rows - margin
    return row


def _units(
    tree: StateTree,
    leaves: Sequence[int],
    shards: Mapping[int, Shard | None],
    views: Mapping[int, Sequence[torch.Tensor]],
) -> list[_Unit]:
    units: dict[Hashable, _Unit] = {}
    for leaf in leaves:
        value, shard = tree.leaves[leaf], shards.get(leaf)
        if shard is not None and not shard.is_empty:
            for number, (view, box) in enumerate(zip(views[leaf], shard.boxes, strict=True)):
                _add(units, (leaf, number), view, (box.offsets, shard.shape))
        elif not isinstance(value, torch.Tensor) or leaf in shards or not is_stored_raw(value):
            units[leaf] = _Unit([(leaf, 0)], (), 0, can_cut=False)
        else:
            _add(units, (leaf, 0), value, tuple(value.shape))
    return list(units.values())


def _add(units: dict[Hashable, _Unit], box: tuple[int, int], tensor: torch.Tensor, place: Hashable) -> None:
    """Add a plain tensor; to the unit that is the same memory, if there is one. ``place``: of the tensor in its whole."""
    nbytes = tensor.numel() * tensor.dtype.itemsize
    key: Hashable = box
    if nbytes and not tensor.is_meta:
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, place
    if key in units:
        units[key].boxes.append(box)
        return
    can_cut = nbytes >= 2 * _CUT_BYTES and tensor.dim() > 0 and tensor.is_contiguous() and not tensor.is_meta
    units[key] = _Unit([box], tuple(tensor.shape), nbytes, can_cut)
