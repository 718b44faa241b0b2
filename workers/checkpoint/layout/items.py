"""The items of a layout, kept in columns: a checkpoint can have a million of them, and an object for each takes 400 bytes.

    Item        one of them, made when somebody asks for it
    ItemKind    what many items have in common: kind, dtype, shape, stride. Models have many tensors and few of these
    Items       all of them: the number of its kind, and six numbers, for each

Trainer, workers and readers see ``Items`` as a sequence of ``Item``; what runs for each item of every save reads columns.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, overload

ROW_COLUMNS = ("kind", "file", "offset", "nbytes", "data_offset", "data_nbytes", "dtype", "shape", "stride")

NOT_IN_A_SLAB = -1
"""The slab offset of an item that was read from a manifest."""

_NUMBERS = ("file", "offset", "nbytes", "data_offset", "data_nbytes", "slab_offset")
_numbers_of = attrgetter(*_NUMBERS)


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor, object or trailer.

    Attributes:
        kind: "tensor", "object", or "frame" for a trailer. Manifests of version 0.1 say "frame", so the literal stays.
        file: index into ``Layout.files``.
        offset: where the blob starts in its file, in bytes.
        nbytes: length of the blob, in bytes.
        data_offset: where the raw bytes start in the file.
        data_nbytes: number of raw bytes.
        dtype: of a tensor, "float32" for example; else "".
        shape, stride: of a tensor, in elements; else ().
        slab_offset: where the raw bytes start in the slab, or ``NOT_IN_A_SLAB``.
    """

    kind: str
    file: int
    offset: int
    nbytes: int
    data_offset: int
    data_nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    slab_offset: int = NOT_IN_A_SLAB

    def to_row(self) -> list[Any]:
        """Return the values of ``ROW_COLUMNS``."""
        return list(_row_of(self))

    @staticmethod
    def from_row(row: Sequence[Any], slab_offset: int = NOT_IN_A_SLAB) -> Item:
        """Make the item of a row, as :meth:`to_row` gives it."""
        kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride = row
        shape, stride = tuple(shape), tuple(stride)
        return Item(kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride, slab_offset)


_row_of = attrgetter(*ROW_COLUMNS)


class ItemKind(NamedTuple):
    """What an item is, wherever it lies. See :class:`Item`."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(item: Item) -> ItemKind:
        """Return the kind of an item."""
        return ItemKind(item.kind, item.dtype, item.shape, item.stride)


@dataclass(frozen=True, slots=True, eq=False)
class Items(Sequence[Item]):
    """Items in columns. Do not modify them.

    Attributes:
        kinds: the different kinds.
        kind: for each item, the position of its kind in ``kinds``.
        file, offset, nbytes, data_offset, data_nbytes, slab_offset: of each item; see :class:`Item`.
    """

    kinds: tuple[ItemKind, ...]
    kind: array[int]
    file: array[int]
    offset: array[int]
    nbytes: array[int]
    data_offset: array[int]
    data_nbytes: array[int]
    slab_offset: array[int]

    @staticmethod
    def of(items: Iterable[Item]) -> Items:
        """Put items into columns."""
        if isinstance(items, Items):
            return items
        kinds: dict[ItemKind, int] = {}
        items = list(items)
        codes = [kinds.setdefault(ItemKind.of(item), len(kinds)) for item in items]
        columns = zip(*map(_numbers_of, items), strict=True) if items else ((),) * len(_NUMBERS)
        return Items(tuple(kinds), column(codes), *map(column, columns))

    def followed_by(self, items: Iterable[Item]) -> Items:
        """Return these items and, behind them, some more."""
        more = Items.of(items)
        codes = column([len(self.kinds) + code for code in more.kind])
        columns = zip(self.columns(), (codes, *more.columns()[1:]), strict=True)
        return Items((*self.kinds, *more.kinds), *(ours + theirs for ours, theirs in columns))

    def tensor_kinds(self) -> list[ItemKind]:
        """List the different kinds of tensors."""
        return [kind for kind in self.kinds if kind.kind == "tensor"]

    def in_slab(self, slab_offset: array[int]) -> Items:
        """Return the same items with places in a slab."""
        return replace(self, slab_offset=slab_offset)

    def kind_of(self, index: int) -> ItemKind:
        """Return the kind of one item, for which no ``Item`` has to be made."""
        return self.kinds[self.kind[index]]

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...

    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(index, slice):
            return tuple(map(self.__getitem__, range(len(self))[index]))
        kind, dtype, shape, stride = self.kinds[self.kind[index]]
        return Item(
            kind,
            self.file[index],
            self.offset[index],
            self.nbytes[index],
            self.data_offset[index],
            self.data_nbytes[index],
            dtype,
            shape,
            stride,
            self.slab_offset[index],
        )

    def __len__(self) -> int:
        return len(self.kind)

    def __iter__(self) -> Iterator[Item]:
        kinds = self.kinds
        for code, file, offset, nbytes, data_offset, data_nbytes, slab_offset in zip(*self.columns(), strict=True):
            kind, dtype, shape, stride = kinds[code]
            yield Item(kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride, slab_offset)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as that of a list

    def columns(self) -> tuple[array[int], ...]:
        """Return the number of the kind, then what ``Item`` has as numbers, in the order of its attributes."""
        return self.kind, self.file, self.offset, self.nbytes, self.data_offset, self.data_nbytes, self.slab_offset

    def to_document(self) -> dict[str, Any]:
        """Return what JSON can hold. A column is the type of its integers and, in base64, their little-endian bytes."""
        names = ("kind", *_NUMBERS)
        return {"kinds": self.kinds, "columns": dict(zip(names, map(_encoded, self.columns()), strict=True))}

    @staticmethod
    def from_document(document: dict[str, Any]) -> Items:
        """Make the items that :meth:`to_document` serialised. Whether they fit together, ``check_layout`` checks.

        Raises:
            KeyError, TypeError, ValueError, IndexError: the document is malformed.
        """
        kinds = tuple(
            ItemKind(kind, dtype, tuple(shape), tuple(stride)) for kind, dtype, shape, stride in document["kinds"]
        )
        columns = [_decoded(document["columns"][name]) for name in ("kind", *_NUMBERS)]
        codes = columns[0]
        if {len(codes)} != set(map(len, columns)):
            raise ValueError("the columns of the items differ in length")
        if set(codes) != set(range(len(kinds))):
            raise ValueError("an item names a kind that is not listed, or a listed kind has no item")
        return Items(kinds, *columns)


def column(values: Iterable[int]) -> array[int]:
    """Make a column of integers, or of a numpy array of 8-byte integers.

    Raises:
        TypeError: the array holds another type.
    """
    made = array("q")
    if isinstance(values, (array, range, list, tuple)):
        return array("q", values)
    view = memoryview(values)  # type: ignore[arg-type]  # it is an array of numpy's
    if view.format not in ("l", "q") or view.itemsize != made.itemsize:
        raise TypeError(f"a column holds integers of 8 bytes; this array holds {view.format} of {view.itemsize} bytes")
    made.frombytes(view.cast("B"))
    return made


def _encoded(values: array[int]) -> str:
    if min(values, default=0) < 0:
        code = "q"
    else:
        most = max(values, default=0)
        code = next((code for code, limit in _LIMITS.items() if most < limit), "q")
    return code + base64.b64encode(_little_endian(array(code, values))).decode()


_LIMITS = {"B": 1 << 8, "H": 1 << 16, "I": 1 << 32}  # types of ``array`` that are of the same size everywhere


def _decoded(text: str) -> array[int]:
    if text[:1] not in ("q", *_LIMITS):
        raise ValueError(f"a column begins with {text[:1]!r}, and must begin with q, {', '.join(_LIMITS)}")
    values = array(text[0])
    values.frombytes(base64.b64decode(text[1:], validate=True))
    return array("q", _little_endian(values))


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return values
    swapped = array(values.typecode, values)
    swapped.byteswap()
    return swapped
