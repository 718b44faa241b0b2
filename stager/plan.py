"""The plan of a snapshot: which bytes are copied where in the slab, and where they go in the checkpoint's files.

Sources are seen as *extents*: stretches of one device's memory. A dense tensor is the stretch it covers; stretches that
overlap (tied weights, views, slices) become one extent and are copied once. A tensor whose elements do not tile a stretch
(expanded, a column of a matrix, a conjugate view) is packed: copied element by element into contiguous memory.

A plan depends on the structure and on each tensor's address, dtype, shape and stride, and on nothing else. It is kept as
long as those are the same, which is checked in full on every save; it is never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from stager.flatten import Flat
from workers.errors import UnstageableError
from workers.formats import Format
from workers.job import Plan
from workers.layout import FileSpec, Item, align
from workers.structure import Node, describe

_SMALLEST_FILE_BYTES = 1 << 20

Fingerprint = tuple[int, torch.dtype, torch.Size, tuple[int, ...], torch.device, bool, bool]


@dataclass(frozen=True, slots=True)
class Copy:
    """One stretch to copy.

    Attributes:
        leaf: number of a leaf whose tensor owns the memory (it is kept alive, and found again in the next save).
        address: of the first byte, on the tensor's device; -1: packed, copy the tensor element by element.
        slab_offset, nbytes: where to, how much.
        leaves: all leaves that lie in it.
    """

    leaf: int
    address: int
    slab_offset: int
    nbytes: int
    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """Attributes:
    copies: what to copy, in slab order.
    objects: leaves that are pickled.
    nbytes: of the tensors in the slab.
    document: ``workers.job.Plan`` as JSON, for the workers.
    plan_id: hash of the document.
    num_tensors, num_files: items and files of tensors; the objects come after them.
    """

    copies: tuple[Copy, ...]
    objects: tuple[int, ...]
    nbytes: int
    document: bytes
    plan_id: str
    num_tensors: int
    num_files: int


class Planner:
    """Makes plans, and keeps the last one.

    Args:
        file_format: on-disk format.
        num_files: at most so many tensor files.
        segment_bytes: see :class:`workers.layout.Layout`.
        rank: of this process in the job; part of the file names.
    """

    def __init__(self, file_format: Format, num_files: int, segment_bytes: int, rank: int = 0) -> None:
        self._format = file_format
        self._num_files = num_files
        self._segment_bytes = segment_bytes
        self._rank = rank
        self._key: tuple[Node, list[Fingerprint | None]] | None = None
        self._plan: SnapshotPlan | None = None

    def plan(self, flat: Flat) -> SnapshotPlan:
        """The plan for this state: the last one if nothing that matters changed.

        Raises:
            UnstageableError: a tensor that cannot be snapshotted, with its key path.
        """
        key = (flat.structure, [_fingerprint(flat, i, leaf) for i, leaf in enumerate(flat.leaves)])
        if self._plan is None or key != self._key:
            self._plan, self._key = self._make(flat, key[1]), key
        return self._plan

    def forget(self) -> None:
        self._plan = self._key = None

    def _make(self, flat: Flat, prints: Sequence[Fingerprint | None]) -> SnapshotPlan:
        tensors = [(i, p) for i, p in enumerate(prints) if p is not None]
        objects = tuple(i for i, p in enumerate(prints) if p is None)
        copies, offsets, nbytes = _place(tensors)
        items, files, item_of = self._lay_out(flat, tensors, offsets)
        for number, leaf in enumerate(objects):
            item_of[leaf] = len(items) + number
        plan = Plan(
            files=files,
            object_file=self._format.object_file_name(self._rank),
            tensors=tuple(items),
            structure=_renumber(flat.structure, item_of),
            segment_bytes=self._segment_bytes,
        )
        document = plan.to_json()
        plan_id = xxhash.xxh3_128_hexdigest(document)
        return SnapshotPlan(tuple(copies), objects, nbytes, document, plan_id, len(items), len(files))

    def _lay_out(
        self, flat: Flat, tensors: list[tuple[int, Fingerprint]], offsets: dict[int, int]
    ) -> tuple[list[Item], tuple[FileSpec, ...], dict[int, int]]:
        """Items in file order. Leaves that are the same bytes seen the same way share one."""
        item_of: dict[int, int] = {}
        known: dict[Any, int] = {}
        unplaced: list[tuple[int, str, tuple[int, ...], tuple[int, ...], int, int, int]] = []
        for leaf, p in tensors:
            identity = p if p[2].numel() else leaf
            if identity in known:
                item_of[leaf] = known[identity]
                continue
            item_of[leaf] = known[identity] = len(unplaced)
            unplaced.append((leaf, *self._frame(flat, leaf, p)))
        total = sum(entry[-1] for entry in unplaced)
        num_files = max(1, min(self._num_files, total // _SMALLEST_FILE_BYTES))
        items: list[Item] = []
        sizes = [0] * num_files
        file, done = 0, 0
        for leaf, dtype, shape, stride, head, data, blob in unplaced:
            while file < num_files - 1 and done * num_files >= total * (file + 1):
                file += 1
            offset = sizes[file]
            items.append(Item("tensor", file, offset, blob, offset + head, data, dtype, shape, stride, offsets[leaf]))
            sizes[file] = align(offset + blob)
            done += blob
        used = [size for size in sizes if size]  # an empty file would have no span to hash
        names = [self._format.tensor_file_name(self._rank, i) for i in range(len(used))]
        numbering = {old: new for new, old in enumerate(i for i, size in enumerate(sizes) if size)}
        if len(used) < num_files:
            items = [replace(item, file=numbering[item.file]) for item in items]
        return items, tuple(map(FileSpec, names, used)), item_of

    def _frame(
        self, flat: Flat, leaf: int, p: Fingerprint
    ) -> tuple[str, tuple[int, ...], tuple[int, ...], int, int, int]:
        """dtype, shape, stride as stored, and the lengths of header, data and blob."""
        dtype, shape = str(p[1]).removeprefix("torch."), tuple(p[2])
        stride = p[3] if _is_dense(p) else _contiguous(shape)
        try:
            head, tail = self._format.tensor_frame(dtype, shape, stride)
        except Exception as error:
            raise UnstageableError(describe(flat.paths[leaf]), f"torch.save cannot write {dtype}: {error}") from error
        nbytes = math.prod(shape) * p[1].itemsize
        return dtype, shape, stride, len(head), nbytes, len(head) + nbytes + len(tail)


def _fingerprint(flat: Flat, leaf: int, value: Any) -> Fingerprint | None:
    """What a tensor's place in a plan depends on; None: it is pickled as an object."""
    if not isinstance(value, torch.Tensor):
        return None
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter and _is_wrapper(value):
        raise UnstageableError(
            describe(flat.paths[leaf]),
            f"is a {kind.__name__}; sharded and wrapper tensors cannot be saved yet: save its local or full tensor",
        )
    if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return None  # rare, and torch.save keeps them exactly
    return (
        value.data_ptr(),
        value.dtype,
        value.shape,
        value.stride(),
        value.device,
        value.is_conj(),
        value.is_neg(),
    )


def _is_wrapper(value: torch.Tensor) -> bool:
    return hasattr(value, "__tensor_flatten__") or torch._C._functorch.is_functorch_wrapped_tensor(value)


def _place(tensors: list[tuple[int, Fingerprint]]) -> tuple[list[Copy], dict[int, int], int]:
    """Copies, the slab offset of each leaf's first byte, and the bytes they take together."""
    extents = _merge([(leaf, p) for leaf, p in tensors if _is_dense(p) and p[2].numel()])
    packed = [(leaf, p) for leaf, p in tensors if not _is_dense(p)]
    offsets = {leaf: 0 for leaf, p in tensors if not p[2].numel()}
    copies: list[Copy] = []
    position = 0
    for start, end, leaves in sorted(extents, key=lambda extent: extent[2][0][0]):
        # The slab starts on a page: keeping the address's place within 64 bytes keeps every view of it aligned.
        position = align(position) + start % 64
        for leaf, p in leaves:
            offsets[leaf] = position + p[0] - start
        copies.append(Copy(leaves[0][0], start, position, end - start, tuple(leaf for leaf, _ in leaves)))
        position += end - start
    seen: dict[Fingerprint, int] = {}
    for leaf, p in packed:
        if p not in seen:
            position = seen[p] = align(position)
            nbytes = p[2].numel() * p[1].itemsize
            copies.append(Copy(leaf, -1, position, nbytes, (leaf,)))
            position += nbytes
        offsets[leaf] = seen[p]
    return copies, offsets, position


def _merge(
    tensors: list[tuple[int, Fingerprint]],
) -> list[tuple[int, int, list[tuple[int, Fingerprint]]]]:
    """Stretches of memory (start, end, who lies in it); overlapping ones become one."""
    extents: list[tuple[int, int, list[tuple[int, Fingerprint]]]] = []
    last_device: torch.device | None = None
    for leaf, p in sorted(tensors, key=lambda entry: (str(entry[1][4]), entry[1][0])):
        start, end = p[0], p[0] + p[2].numel() * p[1].itemsize
        if extents and p[4] == last_device and start < extents[-1][1]:
            first, reach, leaves = extents[-1]
            leaves.append((leaf, p))
            extents[-1] = (first, max(reach, end), leaves)
        else:
            extents.append((start, end, [(leaf, p)]))
        last_device = p[4]
    for _, _, leaves in extents:
        leaves.sort(key=lambda entry: entry[0])
    return extents


def _is_dense(p: Fingerprint) -> bool:
    """Whether the tensor's bytes are exactly one stretch of memory, and mean what they say."""
    _, _, shape, stride, _, conj, neg = p
    if conj or neg:
        return False
    if stride == _contiguous(tuple(shape)):
        return True
    expected = 1
    for length, step in sorted(((n, s) for n, s in zip(shape, stride, strict=True) if n != 1), key=lambda e: e[1]):
        if length and step != expected:
            return False
        expected *= length
    return True


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


def _renumber(node: Node, item_of: dict[int, int]) -> Node:
    if type(node) is int:
        return item_of[node]
    position = 1 if node[0] == "list" else 2
    children = [_renumber(child, item_of) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]
