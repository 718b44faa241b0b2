"""Check that a layout which was read from a file is possible.

The checks come before any allocation, open or write. So a hostile manifest or save record can neither name a path outside
its directory nor ask for more memory than its files hold. A ``check_`` function of a value returns the value. All of them
raise ValueError for what is impossible.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import Layout, is_dense, itemsize_of
from stager.workers.checkpoint.layout.structure import Chunks, absent, leaves

_FILE_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_LARGEST = (1 << 63) - 1  # torch and the kernel count in signed 64-bit numbers
_MAX_DIMS = 256  # bounds the time that multiplying the lengths takes
_MAX_WHOLES = 4  # of so many tensors an item may be a chunk; tied tensors have equal chunks and count as one
_MANY_CORNERS = 1 << 20  # so many corners the chunks of one tensor may have, or 8 per chunk (chunks along 3 dimensions)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, lengths


def _check_of(what: str, is_possible: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if is_possible(value):
            return value
        raise ValueError(f"{str(value)[:60]} is not {what}")

    return check


# type(), not isinstance(): True and False are no numbers.
check_count: Callable[[Any], int] = _check_of(
    "a count (an integer from 0 to 2**63 - 1)", lambda n: type(n) is int and 0 <= n <= _LARGEST
)
check_step: Callable[[Any], int] = _check_of("a step (an integer from 0 on)", lambda n: type(n) is int and n >= 0)
check_time: Callable[[Any], float] = _check_of(
    "a time in seconds", lambda t: type(t) in (int, float) and math.isfinite(t)
)
check_text: Callable[[Any], str] = _check_of("a string", lambda text: isinstance(text, str))
check_file_name: Callable[[Any], str] = _check_of(
    "the name of a file inside the checkpoint's directory",
    lambda name: isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None,
)


def check_layout(layout: Layout, *, of_one_rank: bool = False) -> None:
    """Check that ``layout`` can be the layout of a checkpoint.

    Args:
        of_one_rank: one rank of several contributes this layout; the other ranks have the rest.

    Raises:
        ValueError, TypeError, IndexError: the layout is impossible.
    """
    if check_count(layout.segment_bytes) < 1:
        raise ValueError("segment_bytes is 0, must be positive")
    for spec in layout.files:
        check_file_name(spec.name)
        check_count(spec.nbytes)
    check_distinct([spec.name for spec in layout.files])
    _check_items(layout)
    _check_structure(layout, of_one_rank)


def check_distinct(names: Sequence[str]) -> None:
    """Check that no two files of a checkpoint have the same name."""
    if len(set(names)) != len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise ValueError(f"two files are called {twice}")


def check_shape(value: Any) -> tuple[int, ...]:
    """Check that ``value`` can be the shape, strides or offsets of a tensor; returns a tuple."""
    numbers = tuple(map(check_count, value))
    if len(numbers) > _MAX_DIMS:
        raise ValueError(f"a shape, stride or offset has {len(numbers)} dimensions; at most {_MAX_DIMS} are allowed")
    return numbers


def _check_items(layout: Layout) -> None:
    """Check: spans tile the files, each file in one run; raw bytes lie in their blob; shape, stride and size agree."""
    _check_counts(layout.items)
    # Most items have one of a few (dtype, shape, stride): check each of these once. But True == 1, and True is not a
    # length, so the short cut is only taken where every number is an int.
    lengths = itertools.chain.from_iterable((*item.shape, *item.stride) for item in layout.items)
    may_know = set(map(type, lengths)) <= {int}
    known: set[object] = set()
    position, file = 0, -1
    for index, item, end in layout.spans():
        if item.file != file:
            # Files come in order and once: a file that recurred would be read, and take memory, again each time.
            if item.file != file + 1 or (file >= 0 and position != layout.files[file].nbytes):
                raise ValueError(f"item {index} is in file {item.file}, but the items of file {file} do not end there")
            position, file = 0, item.file
        if item.offset != position or item.offset + item.nbytes > end:
            raise ValueError(
                f"item {index} starts at byte {item.offset} of its file, and the item before it ends at byte {position}"
            )
        if not item.offset <= item.data_offset <= item.data_offset + item.data_nbytes <= item.offset + item.nbytes:
            raise ValueError(f"item {index} has raw bytes that are not inside its own bytes")
        if item.kind != "tensor" or not may_know:
            _check_kind(index, item)
        elif (kind := (item.dtype, item.shape, item.stride, item.data_nbytes)) not in known:
            _check_kind(index, item)
            known.add(kind)
        position = end
    if file + 1 != len(layout.files):
        raise ValueError(f"file {layout.files[file + 1].name} contains no item")


def _check_counts(items: Sequence[Item]) -> None:
    """Check every number of every row, a column at a time, which is faster."""
    for name in ("file", "offset", "nbytes", "data_offset", "data_nbytes"):
        column = list(map(operator.attrgetter(name), items))
        if set(map(type, column)) - {int} or min(column, default=0) < 0 or max(column, default=0) > _LARGEST:
            for number in column:
                check_count(number)


def _check_kind(index: int, item: Item) -> None:
    """Check what depends on the kind of an item alone."""
    if item.kind == "tensor":
        _check_tensor(index, item)
    elif item.kind not in ("object", "frame"):
        raise ValueError(
            f"item {index} is of the kind {str(item.kind)[:60]!r}, which this version of stager does not know"
        )
    elif (item.data_offset, item.data_nbytes) != (item.offset, item.nbytes):
        raise ValueError(f"item {index} is of kind {item.kind}, and must have no header and no tail")
    elif (item.dtype, item.shape, item.stride) != ("", (), ()):
        raise ValueError(f"item {index} is of kind {item.kind}, and must have no dtype, shape or stride")


def _check_tensor(index: int, item: Item) -> None:
    check_shape(item.shape)
    check_shape(item.stride)
    if math.prod(item.shape) * itemsize_of(item.dtype) != item.data_nbytes:
        raise ValueError(
            f"item {index} has {item.data_nbytes} bytes, which a {item.dtype} tensor of shape {item.shape} has not"
        )
    if math.prod(filter(None, item.shape)) > _LARGEST:  # what torch multiplies before it comes to the zero
        raise ValueError(f"item {index} has the shape {item.shape}, which is too large for torch")
    if len(item.stride) != len(item.shape) or not is_dense(item.shape, item.stride):
        raise ValueError(f"item {index} has the stride {item.stride}, which does not fit its shape {item.shape}")


def _check_structure(layout: Layout, of_one_rank: bool) -> None:
    """Check: it is a mapping, no leaf is missing, each item is in it, and chunks fill their tensors."""
    structure = layout.structure
    if not isinstance(structure, list) or structure[:1] not in (["dict"], ["odict"], ["mapping"]):
        raise ValueError("the structure of the state is not a mapping")
    if not of_one_rank and (path := next(absent(structure), None)) is not None:
        raise ValueError(f"no rank wrote the leaf {path}")
    used = [item.kind == "frame" for item in layout.items]
    wholes: dict[Chunks, None] = {}
    for path, leaf in leaves(structure):
        for index in [index for _, index in leaf.parts] if isinstance(leaf, Chunks) else (leaf,):
            if not 0 <= index < len(used):
                raise ValueError(f"leaf {path} names item {index}, and only {len(used)} items are stored")
            if layout.items[index].kind == "frame":
                raise ValueError(f"leaf {path} names item {index}, which is a trailer")
            used[index] = True
        if isinstance(leaf, Chunks) and leaf not in wholes:
            wholes[leaf] = None
            boxes = _check_chunks(layout, leaf)
            if not of_one_rank:
                check_tiling(boxes, leaf.shape)
    if (shared := shared_too_often(wholes)) is not None:
        raise ValueError(f"item {shared} is a chunk of too many tensors; at most {_MAX_WHOLES} are allowed")
    if not all(used):
        raise ValueError(f"no leaf of the state's structure names item {used.index(False)}, which is stored")


def shared_too_often(wholes: Iterable[Chunks]) -> int | None:
    """Return an item that is a chunk of too many of ``wholes``, or None. Each whole tensor takes memory."""
    times = Counter([index for chunks in wholes for _, index in chunks.parts])
    return next((index for index, number in times.items() if number > _MAX_WHOLES), None)


def _check_chunks(layout: Layout, chunks: Chunks) -> list[Box]:
    """Check that the chunks lie in the whole. :func:`check_tiling` must follow before memory for the whole is taken."""
    check_shape(chunks.shape)
    boxes: list[Box] = []
    for offsets, index in chunks.parts:
        item, first = layout.items[index], layout.items[chunks.parts[0][1]]
        if item.kind != "tensor" or item.dtype != first.dtype:
            raise ValueError(f"item {index} cannot be a chunk of a {first.dtype} tensor")
        if not len(chunks.shape) == len(offsets) == len(item.shape) or not all(
            0 <= offset <= offset + length <= whole
            for offset, length, whole in zip(offsets, item.shape, chunks.shape, strict=True)
        ):
            raise ValueError(f"item {index} at {offsets} is not inside a tensor of shape {chunks.shape}")
        boxes.append((offsets, item.shape))
    return boxes


def check_tiling(boxes: list[Box], shape: tuple[int, ...]) -> None:
    """Check that boxes inside a tensor of ``shape`` cover each of its elements exactly once."""
    num_elements = sum(math.prod(lengths) for _, lengths in boxes)
    if num_elements != math.prod(shape) or math.prod(filter(None, shape)) > _LARGEST:
        raise ValueError(
            f"the chunks of a tensor of shape {shape} have {num_elements} elements, and it has {math.prod(shape)}"
        )
    if num_elements and not _tile(boxes, shape):
        raise ValueError(f"the chunks of a tensor of shape {shape} overlap")


def _tile(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Return whether boxes, which have as many elements as the whole, fill it without overlap.

    A box is the running sum of its corners along each dimension. So, modulo 2, the corners determine what boxes cover.
    If all corners of the boxes and of the whole cancel, the boxes cover each element an odd number of times. That is
    once, because otherwise the boxes would have more elements than the whole.
    """
    boxes = [box for box in boxes if 0 not in box[1]]
    split = [dim for dim, whole in enumerate(shape) if any(lengths[dim] != whole for _, lengths in boxes)]
    if len(boxes) << len(split) > max(_MANY_CORNERS, 8 * len(boxes)):
        raise ValueError(f"a tensor is cut into {len(boxes)} chunks along {len(split)} dimensions, which are too many")
    left: set[tuple[int, ...]] = set()
    for offsets, lengths in (*boxes, ((0,) * len(shape), shape)):
        left ^= set(itertools.product(*((offsets[dim], offsets[dim] + lengths[dim]) for dim in split)))
    return not left
