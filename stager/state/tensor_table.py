"""The tensor table: what a plan is made from. One row for each tensor, in numpy's columns.

What many tensors have in common (dtype, shape, stride) is a *memory kind*, and a row has its number. So Python code runs for
each kind, and not for each tensor: a model of a million tensors has a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from stager.workers.checkpoint.layout.layout import contiguous_stride, is_dense


@dataclass(frozen=True)
class MemoryKind:
    """What the memory of a tensor is like.

    Attributes:
        dtype, shape, stride: as torch has them.
    """

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps between them."""
        return self.shape.numel() * self.dtype.itemsize

    @cached_property
    def span_nbytes(self) -> int:
        """Bytes from the first byte to the last."""
        if not self.nbytes:
            return 0
        reach = sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        return (reach + 1) * self.dtype.itemsize

    @cached_property
    def is_dense(self) -> bool:
        """Whether the elements fill the span and share no memory."""
        return is_dense(self.shape, self.stride)

    @cached_property
    def is_row_major(self) -> bool:
        """Whether the elements are in C order, without gaps."""
        return self.stride == contiguous_stride(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class TensorTable:
    """Tensors, in columns.

    Attributes:
        leaves: numbers of their leaves.
        addresses: of each tensor's first element, on its device; from 2**63 on, 2**64 is subtracted.
        kinds: the different memory kinds.
        codes: for each tensor, the position of its kind in ``kinds``.
        devices: the different devices, in the order of their names.
        on: for each tensor, the position of its device in ``devices``.
        lazy: whether it is a conjugate or negative view: its memory does not hold its values.
    """

    leaves: Any
    addresses: Any
    kinds: Sequence[MemoryKind]
    codes: Any
    devices: Sequence[torch.device]
    on: Any
    lazy: Any

    def of_each(self, of_kind: Callable[[MemoryKind], int]) -> Any:
        """Return a number for each tensor that depends on its kind alone."""
        return np.array([of_kind(kind) for kind in self.kinds] or [0], dtype=np.int64)[self.codes]

    def where(self, chosen: Any) -> TensorTable:
        """Return the rows for which ``chosen`` (an array of bool) is true."""
        leaves, addresses, codes, on, lazy = (
            column[chosen] for column in (self.leaves, self.addresses, self.codes, self.on, self.lazy)
        )
        return TensorTable(leaves, addresses, self.kinds, codes, self.devices, on, lazy)

    @property
    def on_host(self) -> Any:
        """Whether the CPU can read each tensor's memory, as an array of bool."""
        return np.array([device.type == "cpu" for device in self.devices] or [True])[self.on]

    def identities(self, rows: Any) -> list[tuple[int, int, int, bool]]:
        """Return a key for each of these rows. Rows with equal keys are the same bytes, seen the same way."""
        columns = (self.addresses[rows], self.codes[rows], self.on[rows], self.lazy[rows])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def __len__(self) -> int:
        return len(self.leaves)
