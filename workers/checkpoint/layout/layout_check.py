"""Whether a layout that comes from a file is possible at all.

Everything is checked before anything is allocated, opened or written, so that a hostile manifest or record can neither name
a path outside its directory nor ask for more memory than its files hold.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stager.workers.checkpoint.layout.dtype_sizes import itemsize_of
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.structure import Chunks, absent, leaves

_FILE_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_LARGEST = (1 << 63) - 1  # what torch and the kernel count in
_MAX_DIMS = 256  # multiplying more lengths than any tensor has would take longer with each
_MAX_WHOLES = 4  # that an item is a chunk of; tied tensors have equal chunks, and are one
_MANY_CORNERS = 1 << 20  # of the chunks of a tensor; beside 8 of each, which is what chunks along 3 dimensions have


def check_layout(layout: Layout, *, is_share: bool = False) -> None:
    """
    Args:
        is_share: it is what one rank of several contributes: the other ranks have the rest.

    Raises:
        ValueError, TypeError, IndexError: it cannot be the layout of a checkpoint.
    """
    check_count(layout.segment_bytes)
    if layout.segment_bytes < 1:
        raise ValueError("segment_bytes is 0")
    for spec in layout.files:
        check_file_name(spec.name)
        check_count(spec.nbytes)
    check_distinct([spec.name for spec in layout.files])
    _check_items(layout)
    _check_structure(layout, is_share)


def check_file_name(value: Any) -> str:
    """``value``, when it names a file inside the checkpoint's directory."""
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise ValueError(f"not a file name: {value!r}")
    return value


def check_distinct(names: Sequence[str]) -> None:
    """That no two files of a checkpoint have one name."""
    if len(set(names)) != len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise ValueError(f"two files are called {twice}")


def check_count(value: Any) -> int:
    """``value``, when it is a number of bytes, or elements."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"not a count: {str(value)[:60]}")
    return value


def check_shape(value: Any) -> tuple[int, ...]:
    """``value``, when it can be the shape, stride or offsets of a tensor."""
    numbers = tuple(map(check_count, value))
    if len(numbers) > _MAX_DIMS:
        raise ValueError(f"{len(numbers)} dimensions are too many")
    return numbers


def check_step(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a step: {str(value)[:60]}")
    return value


def check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a string: {str(value)[:60]}")
    return value


def check_time(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"not a time: {str(value)[:60]}")
    return float(value)


def _check_items(layout: Layout) -> None:
    """Spans tile the files, each file in one run; the raw bytes lie in the blob; shape, stride and size agree."""
    _check_counts(layout.items)
    # Most items have one of a few kinds. Equal is not the same, though: True == 1, and is no length.
    lengths = itertools.chain.from_iterable((*item.shape, *item.stride) for item in layout.items)
    known: set[object] | None = set() if set(map(type, lengths)) <= {int} else None
    position, file = 0, -1
    for index, item, end in layout.spans():
        if item.file != file:
            # A file that came back would be read, and take memory, once more each time.
            if item.file != file + 1 or (file >= 0 and position != layout.files[file].nbytes):
                raise ValueError(f"item {index}: its file is not the next one")
            position, file = 0, item.file
        if item.offset != position or item.offset + item.nbytes > end:
            raise ValueError(f"item {index}: its span does not follow the one before it")
        if not item.offset <= item.data_offset <= item.data_offset + item.data_nbytes <= item.offset + item.nbytes:
            raise ValueError(f"item {index}: its data is not inside its blob")
        kind = (item.dtype, item.shape, item.stride, item.data_nbytes) if item.kind == "tensor" else None
        if kind is None or known is None or kind not in known:
            _check_kind(index, item)
            if kind is not None and known is not None:
                known.add(kind)
        position = end
    if file + 1 != len(layout.files):
        raise ValueError(f"{layout.files[file + 1].name} holds no item")


def _check_counts(items: Sequence[Item]) -> None:
    """Every number of every row, a column at a time."""
    for name in ("file", "offset", "nbytes", "data_offset", "data_nbytes"):
        column = list(map(operator.attrgetter(name), items))
        if set(map(type, column)) - {int} or min(column, default=0) < 0 or max(column, default=0) > _LARGEST:
            for number in column:
                check_count(number)


def _check_kind(index: int, item: Item) -> None:
    if item.kind in ("object", "frame"):
        if (item.data_offset, item.data_nbytes) != (item.offset, item.nbytes):
            raise ValueError(f"item {index}: an item of the kind {item.kind} is all data")
        if (item.dtype, item.shape, item.stride) != ("", (), ()):
            raise ValueError(f"item {index}: an item of the kind {item.kind} has neither dtype nor shape")
        return
    if item.kind != "tensor":
        raise ValueError(f"item {index}: unknown kind {str(item.kind)[:60]!r}")
    check_shape(item.shape)
    check_shape(item.stride)
    if math.prod(item.shape) * itemsize_of(item.dtype) != item.data_nbytes:
        raise ValueError(f"item {index}: {item.dtype} of shape {item.shape} is not {item.data_nbytes} bytes")
    if math.prod(filter(None, item.shape)) > _LARGEST:  # what torch multiplies before it comes to the zero
        raise ValueError(f"item {index}: shape {item.shape} is too large")
    if len(item.stride) != len(item.shape) or not is_dense(item.shape, item.stride):
        raise ValueError(f"item {index}: stride {item.stride} does not cover shape {item.shape}")


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether each element has a place of its own in memory, and no place between them is unused."""
    if 0 in shape:
        return True
    expected = 1
    for length, step in sorted(
        ((n, s) for n, s in zip(shape, stride, strict=True) if n != 1), key=lambda pair: pair[1]
    ):
        if step != expected:
            return False
        expected *= length
    return True


def _check_structure(layout: Layout, is_share: bool) -> None:
    structure = layout.structure
    if not isinstance(structure, list) or not structure or structure[0] == "list":
        raise ValueError("the state is not a mapping")
    if not is_share and (path := next(absent(structure), None)) is not None:
        raise ValueError(f"leaf {path} is nowhere")
    used = [False] * len(layout.items)
    wholes: dict[Chunks, None] = {}
    for path, leaf in leaves(structure):
        for index in [index for _, index in leaf.parts] if isinstance(leaf, Chunks) else (leaf,):
            if not 0 <= index < len(used):
                raise ValueError(f"leaf {path} names item {index} of {len(used)}")
            if layout.items[index].kind == "frame":
                raise ValueError(f"leaf {path} names item {index}, which is a frame")
            used[index] = True
        if isinstance(leaf, Chunks) and leaf not in wholes:
            wholes[leaf] = None
            boxes = _check_chunks(layout, leaf)
            if not is_share:
                check_tiling(boxes, leaf.shape)
    if (shared := shared_too_often(wholes)) is not None:
        raise ValueError(f"item {shared} is a chunk of too many tensors")
    for index, item in enumerate(layout.items):
        if not used[index] and item.kind != "frame":
            raise ValueError(f"item {index} is in no place of the structure")


def shared_too_often(wholes: Iterable[Chunks]) -> int | None:
    """An item that is a chunk of more tensors than there may be; each whole takes memory.

    Args:
        wholes: tensors, of which no two are equal.
    """
    times = Counter([index for chunks in wholes for _, index in chunks.parts])
    return next((index for index, number in times.items() if number > _MAX_WHOLES), None)


def _check_chunks(layout: Layout, chunks: Chunks) -> list[Box]:
    """The parts lie in the whole. Whether they fill it has to be checked, too, before memory for it is taken."""
    check_shape(chunks.shape)
    boxes: list[Box] = []
    for offsets, index in chunks.parts:
        item, first = layout.items[index], layout.items[chunks.parts[0][1]]
        if item.kind != "tensor" or item.dtype != first.dtype:
            raise ValueError(f"item {index}: not a part of a {first.dtype} tensor")
        if not len(chunks.shape) == len(offsets) == len(item.shape) or not all(
            0 <= offset <= offset + length <= whole
            for offset, length, whole in zip(offsets, item.shape, chunks.shape, strict=True)
        ):
            raise ValueError(f"item {index}: not inside a tensor of shape {chunks.shape}")
        boxes.append((offsets, item.shape))
    return boxes


Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, lengths


def check_tiling(boxes: list[Box], shape: tuple[int, ...]) -> None:
    """That boxes which lie in a tensor of ``shape`` fill it, each element once.

    Raises:
        ValueError
    """
    num_elements = sum(math.prod(lengths) for _, lengths in boxes)
    if num_elements != math.prod(shape) or math.prod(filter(None, shape)) > _LARGEST:
        raise ValueError(f"{num_elements} elements are not a tensor of shape {shape}")
    if num_elements and not _tile(boxes, shape):
        raise ValueError(f"the chunks of a tensor of shape {shape} overlap")


def _tile(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes of as many elements as the whole fill it without overlap.

    Counted modulo 2, what boxes cover is determined by their corners, modulo 2 as well (a box is the running sum of its
    corners along each dimension). So if the corners that are left over are those of the whole, every element is covered an
    odd number of times, which is once, or there would be more elements than in the whole.
    """
    boxes = [box for box in boxes if 0 not in box[1]]
    split = [dim for dim, whole in enumerate(shape) if any(lengths[dim] != whole for _, lengths in boxes)]
    if len(boxes) << len(split) > max(_MANY_CORNERS, 8 * len(boxes)):
        raise ValueError(f"{len(boxes)} chunks along {len(split)} dimensions are too many")
    left: set[tuple[int, ...]] = set()
    for offsets, lengths in (*boxes, ((0,) * len(shape), shape)):
        left ^= set(itertools.product(*((offsets[dim], offsets[dim] + lengths[dim]) for dim in split)))
    return not left
