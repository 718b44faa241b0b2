"""The tensors of a checkpoint as one file has them: each once, whole, also where several ranks wrote it in chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import Item, contiguous_stride
from stager.workers.checkpoint.layout.structure import Chunks, Node, Path, describe, leaves, map_leaves


@dataclass(frozen=True, slots=True)
class Part:
    """``item`` holds what is at ``offsets`` of the whole tensor."""

    offsets: tuple[int, ...]
    item: int


@dataclass(slots=True)
class Source:
    """Attributes:
    paths: of the tensor in the state.
    dtype, shape: of the whole.
    stride: as stored, if it is in one part; else in C order.
    parts: what it consists of.
    """

    paths: list[Path]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return describe(self.paths[0])


@dataclass(frozen=True, slots=True)
class Contents:
    """Attributes:
    tensors: each once.
    objects: items that are pickled.
    object_paths: of each of ``objects``, the first.
    structure: its leaves number the tensors first, then the objects.
    """

    tensors: list[Source]
    objects: list[int]
    object_paths: list[Path]
    structure: Node


def contents_of(manifest: Manifest) -> Contents:
    items = manifest.layout.items
    tensors: dict[object, Source] = {}
    objects: dict[int, Path] = {}
    keys: list[object] = []  # of each leaf
    for path, leaf in leaves(manifest.layout.structure):
        if isinstance(leaf, int) and items[leaf].kind == "object":
            objects.setdefault(leaf, path)
            keys.append(("object", leaf))
            continue
        if leaf not in tensors:
            tensors[leaf] = _source(leaf, items)
        tensors[leaf].paths.append(path)
        keys.append(leaf)
    numbers: dict[object, int] = {key: number for number, key in enumerate(tensors)}
    numbers |= {("object", leaf): len(tensors) + number for number, leaf in enumerate(objects)}
    following = iter(keys)
    structure = map_leaves(manifest.layout.structure, lambda _: numbers[next(following)])
    return Contents(list(tensors.values()), list(objects), list(objects.values()), structure)


def _source(leaf: int | Chunks, items: tuple[Item, ...]) -> Source:
    if isinstance(leaf, Chunks):
        dtype = items[leaf.parts[0][1]].dtype
        parts = tuple(Part(offsets, index) for offsets, index in leaf.parts)
        return Source([], dtype, leaf.shape, contiguous_stride(leaf.shape), parts)
    item = items[leaf]
    return Source([], item.dtype, item.shape, item.stride, (Part((0,) * len(item.shape), leaf),))


def is_c_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(n == 1 or a == b for n, a, b in zip(shape, stride, contiguous_stride(shape), strict=True)) or 0 in shape


@dataclass(frozen=True, slots=True)
class Runs:
    """A part in C order is stretches of ``nbytes`` bytes, each in one place of the whole, which is in C order too."""

    nbytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int

    def place(self, run: int) -> int:
        """Where in the whole a run begins: bytes."""
        position = self.first
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            run, index = divmod(run, length)
            position += index * stride
        return position


def runs_of(whole: tuple[int, ...], part: tuple[int, ...], offsets: tuple[int, ...], dtype: str) -> Runs:
    """
    Args:
        whole, part: shapes.
        offsets: of the part in the whole.
    """
    size = dtype_of(dtype).itemsize
    strides = tuple(stride * size for stride in contiguous_stride(whole))
    outer = len(whole)
    while outer > 0 and part[outer:] == whole[outer:]:
        outer -= 1
    # Below ``outer`` the part is as wide as the whole, so a step along ``outer`` continues where the one before ended.
    nbytes = math.prod(part[outer:]) * size
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return Runs(max(1, nbytes), part[:outer], strides[:outer], first)
