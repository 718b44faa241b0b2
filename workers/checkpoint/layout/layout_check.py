"""Check that a layout which was read from a file is possible.

The checks come before any allocation, open or write. So a hostile manifest or save record can neither name a path outside
its directory nor ask for more memory than its files hold. A ``check_`` function of a value returns the value. All of them
raise ValueError for what is impossible.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from operator import add, is_, le
from typing import Any

from stager.workers.checkpoint.layout.items import NOT_IN_A_SLAB, ROW_COLUMNS, ItemKind, Items, column
from stager.workers.checkpoint.layout.layout import Layout, is_dense, itemsize_of
from stager.workers.checkpoint.layout.structure import Chunks, absent, is_chunks, leaves, open_container
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node, open_tensor

_FILE_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_HIGHEST_BYTE = 7 if sys.byteorder == "little" else 0  # of a column's integer
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


check_sidecar_name: Callable[[Any], str] = _check_of(
    "the name of a file", lambda name: isinstance(name, str) and "/" not in name and name not in ("", ".", "..")
)


def check_texts(values: Sequence[Any]) -> tuple[str, ...]:
    """Check that each of ``values``, of which there may be a million, is a string; returns a tuple."""
    texts = tuple(values)
    return texts if set(map(type, texts)) <= {str} else tuple(map(check_text, texts))


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


def items_of_rows(rows: Sequence[Sequence[Any]]) -> tuple[Items, Sequence[Any]]:
    """Put rows that were read from a file into columns. Each has the values of ``ROW_COLUMNS``, and one more.

    Returns:
        The items, and the last values of the rows.

    Raises:
        ValueError, TypeError: a row has too few or too many values, or one of the wrong type.
    """
    if not isinstance(rows, list):
        raise TypeError(f"the items are a {type(rows).__name__}, and must be a list")
    if not rows:
        return Items.of(()), ()
    kind, *numbers, dtype, shapes, strides, others = zip(*rows, strict=True)
    if len(rows[0]) != len(ROW_COLUMNS) + 1:
        raise ValueError(f"a row of items has {len(rows[0])} values, and must have {len(ROW_COLUMNS) + 1}")
    file, offset, nbytes, data_offset, data_nbytes = map(_column_of_counts, numbers)
    lengths = set(map(type, itertools.chain.from_iterable((*shapes, *strides))))
    if lengths - {int}:  # True == 1, so the kinds below would not tell them apart
        list(map(check_shape, (*shapes, *strides)))
    kinds: dict[Any, int] = {}
    keys = zip(kind, dtype, map(tuple, shapes), map(tuple, strides), strict=True)
    codes = column([kinds.setdefault(key, len(kinds)) for key in keys])
    not_in_slab = column([NOT_IN_A_SLAB]) * len(codes)
    return Items(
        tuple(ItemKind(*key) for key in kinds), codes, file, offset, nbytes, data_offset, data_nbytes, not_in_slab
    ), others


def _column_of_counts(values: Sequence[Any]) -> array[int]:
    """Put values into a column, each of which :func:`check_count` takes."""
    with suppress(TypeError, OverflowError):
        made = column(values)
        if set(map(type, values)) == {int} and _are_counts(made):
            return made
    return column(list(map(check_count, values)))


def _are_counts(values: array[int]) -> bool:
    """Return whether no integer is negative: whether the highest bit of none is set."""
    return values.tobytes()[_HIGHEST_BYTE :: values.itemsize].isascii()


def _check_items(layout: Layout) -> None:
    """Check: spans tile the files, each file in one run; raw bytes lie in their blob; shape, stride and size agree."""
    items = layout.items
    *columns, _ = items.columns()
    for numbers in columns:
        if not _are_counts(numbers):
            check_count(min(numbers))
    # Most items have one of a few dtypes and shapes: check each of these once.
    firsts = dict(zip(reversed(items.kind), range(len(items) - 1, -1, -1), strict=True))
    sizes = {code: _check_kind(index, items.kinds[code]) for code, index in sorted(firsts.items())}
    if _tile_files(layout) and _agree_in_size(items, sizes):
        return
    # Something is wrong, and is told with the number of the item.
    position, last = 0, -1
    rows = zip(*columns, layout.ends(), strict=True)
    for index, (code, file, offset, nbytes, data_offset, data_nbytes, end) in enumerate(rows):
        if file != last:
            # Files come in order and once: a file that recurred would be read, and take memory, again each time.
            if file != last + 1 or (last >= 0 and position != layout.files[last].nbytes):
                raise ValueError(f"item {index} is in file {file}, but the items of file {last} do not end there")
            position, last = 0, file
        if offset != position or offset + nbytes > end:
            raise ValueError(
                f"item {index} starts at byte {offset} of its file, and the item before it ends at byte {position}"
            )
        if not offset <= data_offset <= data_offset + data_nbytes <= offset + nbytes:
            raise ValueError(f"item {index}: its data (bytes {data_offset} on) does not lie inside the item")
        size = sizes[code]
        if size is None:
            if (data_offset, data_nbytes) != (offset, nbytes):
                raise ValueError(
                    f"item {index} is of kind {items.kinds[code].kind}, and must have no header and no tail"
                )
        elif size != data_nbytes:
            _, dtype, shape, _ = items.kinds[code]
            raise ValueError(f"item {index} has {data_nbytes} bytes; a {dtype} tensor of shape {shape} needs {size}")
        position = end
    if last + 1 != len(layout.files):
        raise ValueError(f"file {layout.files[last + 1].name} contains no item")


def _tile_files(layout: Layout) -> bool:
    """Return whether spans tile the files, each file in one run, and raw bytes lie in their blob."""
    items, files, starts, ends = layout.items, layout.files_of_items(), layout.starts(), layout.ends()
    if files != sorted(files) or list(dict.fromkeys(files)) != list(range(len(layout.files))):
        return False
    if any(starts[bisect_left(files, file)] for file in range(len(layout.files))):
        return False
    # The end of a span is the start of the next one in its file. So they tile it if each blob lies in its span.
    blob_ends = list(map(add, starts, items.nbytes))
    return (
        all(map(le, blob_ends, ends))
        and all(map(le, starts, items.data_offset))
        and all(map(le, map(add, items.data_offset, items.data_nbytes), blob_ends))
    )


def _agree_in_size(items: Items, sizes: Mapping[int, int | None]) -> bool:
    """Return whether each tensor has as many raw bytes as its kind (``sizes``), and an object or trailer has no others."""
    wanted = list(map(sizes.__getitem__, items.kind))
    for index in compress(range(len(wanted)), map(is_, wanted, itertools.repeat(None))):
        if items.data_offset[index] != items.offset[index]:
            return False
        wanted[index] = items.nbytes[index]
    return wanted == items.data_nbytes.tolist()


def _check_kind(index: int, kind: ItemKind) -> int | None:
    """Check what items of one kind have in common.

    Args:
        index: of an item of this kind, for messages.

    Returns:
        The number of raw bytes of a tensor of this kind; None if the items are objects or trailers.
    """
    if kind.kind == "tensor":
        return _check_tensor(index, kind)
    if kind.kind not in ("object", "frame"):
        raise ValueError(
            f"item {index} is of the kind {str(kind.kind)[:60]!r}, which this version of stager does not know"
        )
    if (kind.dtype, kind.shape, kind.stride) != ("", (), ()):
        raise ValueError(f"item {index} is of kind {kind.kind}, and must have no dtype, shape or stride")
    return None


def _check_tensor(index: int, kind: ItemKind) -> int:
    check_shape(kind.shape)
    check_shape(kind.stride)
    if math.prod(filter(None, kind.shape)) > _LARGEST:  # what torch multiplies before it comes to the zero
        raise ValueError(f"item {index} has the shape {kind.shape}, which is too large for torch")
    nbytes = math.prod(kind.shape) * itemsize_of(kind.dtype)
    if len(kind.stride) != len(kind.shape) or not is_dense(kind.shape, kind.stride):
        raise ValueError(f"item {index} has the stride {kind.stride}, which does not fit its shape {kind.shape}")
    return nbytes


def _check_structure(layout: Layout, of_one_rank: bool) -> None:
    """Check: it is a mapping, no leaf is missing, each item is in it, and chunks fill their tensors."""
    structure = layout.structure
    if not isinstance(structure, list) or structure[:1] not in (["dict"], ["odict"], ["mapping"]):
        raise ValueError("the stored structure does not begin with a mapping of names to values")
    if _names_each_item(structure, layout.items):  # most checkpoints
        return
    if not of_one_rank and (path := next(absent(structure), None)) is not None:
        raise ValueError(f"no rank wrote the leaf {path}")
    items = layout.items
    is_frame = [items.kinds[code].kind == "frame" for code in items.kind]
    used = is_frame.copy()
    wholes: dict[Chunks, None] = {}
    count = len(used)
    for path, leaf in leaves(structure):
        if type(leaf) is int and 0 <= leaf < count and not is_frame[leaf]:  # most
            used[leaf] = True
            continue
        for index in [index for _, index in leaf.parts] if isinstance(leaf, Chunks) else (leaf,):
            if not 0 <= index < len(used):
                raise ValueError(f"leaf {path} names item {index}, and only {len(used)} items are stored")
            if is_frame[index]:
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


def _names_each_item(structure: Any, items: Items) -> bool:
    """Return whether the leaves of a structure are items, none of them a trailer, and no item is missing.

    False: there may be chunks, or leaves that another rank writes, or something is wrong.
    """
    try:
        named = set(_items_of_leaves(structure))
    except ValueError:
        return False
    trailers = {code for code, kind in enumerate(items.kinds) if kind.kind == "frame"}
    trailing = {number for number, code in enumerate(items.kind) if code in trailers} if trailers else set()
    return named.isdisjoint(trailing) and named | trailing == set(range(len(items)))


def _items_of_leaves(structure: Any) -> list[int]:
    """List the items of all leaves, in any order.

    Raises:
        ValueError: a node is malformed, or a leaf is no item.
    """
    found: list[int] = []
    todo = [(structure, 0)]
    while todo:
        node, depth = todo.pop()
        if is_tensor_node(node):
            inner, _, recipes = open_tensor(node)
            children: Sequence[Any] = [inner, *recipes]
            if set(map(type, children)) != {int}:
                raise ValueError("a part of a tensor is no item")
        elif not isinstance(node, list) or is_chunks(node):
            raise ValueError("a leaf is no item")
        else:
            children = open_container(node, depth).children
        if set(map(type, children)) <= {int}:  # most
            found += children
        else:
            found += [child for child in children if type(child) is int]
            todo += [(child, depth + 1) for child in children if type(child) is not int]
    return found


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
            raise ValueError(f"item {index} is no {first.dtype} tensor, and another chunk of the same tensor is")
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
