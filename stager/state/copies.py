"""Copies: the stretches of memory that a snapshot consists of, in columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, overload

import numpy as np

SMALL_BYTES = 64 << 10  # up to here many in one system call is faster than a memmove for each

PACKED = -1  # in the place of an address


@dataclass(frozen=True, slots=True)
class Copy:
    """One stretch of memory to copy.

    Attributes:
        leaf: number of a leaf whose tensor owns the memory. The next save finds the memory through the same leaf.
        address: of the first byte, on the tensor's device; ``PACKED``: see :attr:`is_packed`.
        slab_offset, nbytes: where to, how much.
        leaves: numbers of all leaves that lie in it.
        on_host: whether the address can be read by the CPU.
    """

    leaf: int
    address: int
    slab_offset: int
    nbytes: int
    leaves: tuple[int, ...]
    on_host: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether it is copied element by element, because its tensor is no stretch of memory."""
        return self.address == PACKED


_numbers_of = attrgetter("leaf", "address", "slab_offset", "nbytes", "on_host")


@dataclass(frozen=True, slots=True, eq=False)
class Copies(Sequence[Copy]):
    """Copies, in numpy's columns; a :class:`Copy` is made when somebody asks for it.

    Attributes:
        leaf, address, slab_offset, nbytes, on_host: of each copy; see :class:`Copy`. Some devices have addresses of 2**63
            and more; of these 2**64 is subtracted, so that they fit signed integers of 8 bytes.
        shared: by leaf, the leaves of the copies that have several.
    """

    leaf: Any
    address: Any
    slab_offset: Any
    nbytes: Any
    on_host: Any
    shared: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(copies: Sequence[Copy]) -> Copies:
        """Put copies into columns. No two of them may have the same ``leaf`` and different ``leaves``."""
        if isinstance(copies, Copies):
            return copies
        rows = [(leaf, _signed(address), *others) for leaf, address, *others in map(_numbers_of, copies)]
        numbers = np.array(rows, dtype=np.int64).reshape(len(copies), 5)
        shared = {copy.leaf: copy.leaves for copy in copies if copy.leaves != (copy.leaf,)}
        leaf, address, slab_offset, nbytes, on_host = numbers.T
        return Copies(leaf, address, slab_offset, nbytes, on_host.astype(bool), shared)

    def where(self, chosen: Any) -> Copies:
        """Return those that are chosen: by an array of bool, or of positions."""
        leaf, address, slab_offset = self.leaf[chosen], self.address[chosen], self.slab_offset[chosen]
        return Copies(leaf, address, slab_offset, self.nbytes[chosen], self.on_host[chosen], self.shared)

    @property
    def is_packed(self) -> Any:
        """Of each copy, as an array of bool; see :attr:`Copy.is_packed`."""
        return self.address == PACKED

    def all_leaves(self) -> list[int]:
        """List the leaves of all copies."""
        leaves: list[int] = self.leaf.tolist()
        if not self.shared:
            return leaves
        shared = self.shared
        return [leaf for first in leaves for leaf in shared.get(first, (first,))]

    def all_in(self, chosen: Any) -> Any:
        """Tell of each copy whether all its leaves are chosen: by an array that has a bool for each leaf of the state."""
        are = chosen[self.leaf]
        if self.shared:
            for position in np.flatnonzero(np.isin(self.leaf, list(self.shared))).tolist():
                are[position] = chosen[list(self.shared[int(self.leaf[position])])].all()
        return are

    @overload
    def __getitem__(self, index: int) -> Copy: ...

    @overload
    def __getitem__(self, index: slice) -> Copies: ...

    def __getitem__(self, index: int | slice) -> Copy | Copies:
        if isinstance(index, slice):
            return self.where(index)
        columns = (self.leaf, self.address, self.slab_offset, self.nbytes)
        leaf, address, slab_offset, nbytes = (int(column[index]) for column in columns)
        return Copy(
            leaf, _unsigned(address), slab_offset, nbytes, self.shared.get(leaf, (leaf,)), bool(self.on_host[index])
        )

    def __iter__(self) -> Iterator[Copy]:
        columns = (self.leaf, self.address, self.slab_offset, self.nbytes, self.on_host)
        shared = self.shared
        for leaf, address, slab_offset, nbytes, on_host in zip(*(column.tolist() for column in columns), strict=True):
            yield Copy(leaf, _unsigned(address), slab_offset, nbytes, shared.get(leaf, (leaf,)), on_host)

    def __len__(self) -> int:
        return len(self.leaf)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:  # so that a dataclass may have one as its default
        return hash(len(self))


def _signed(address: int) -> int:
    return address - _TWO_TO_64 if address >= _TWO_TO_64 >> 1 else address


def _unsigned(address: int) -> int:
    return address if address >= PACKED else address + _TWO_TO_64


_TWO_TO_64 = 1 << 64
NO_COPIES = Copies.of(())
