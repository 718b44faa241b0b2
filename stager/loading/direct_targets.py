"""Which tensors of the target take the bytes of their items as they are: a fast answer for most tensors.

A state can have 100,000 tensors. So they are asked by columns, one property of all of them after another, and what the
items have in common is worked out once for each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch

from stager.loading.difference import PLAIN
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.items import ItemKind, Items
from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.checkpoint.layout.structure import Node

_description = attrgetter("is_cpu", "layout", "dtype", "shape")
_wanted_description = attrgetter("description")
_NO_TENSOR = ()
"""Equal to no description."""


class _Wanted(NamedTuple):
    """What a tensor has to be like, to take the bytes of items of one kind.

    Attributes:
        description: what ``_description`` returns for it.
        itemsize, nbytes: of one element, and of all.
    """

    description: tuple[Any, ...]
    itemsize: int
    nbytes: int


class DirectTargets:
    """Tells which values of the target certainly take the bytes of their items as they are.

    Args:
        items: of the checkpoint.
    """

    def __init__(self, items: Items) -> None:
        self._codes = items.kind
        self._wanted = list(map(_wanted_for, items.kinds))

    def among(self, nodes: Sequence[Node], values: Sequence[Any]) -> list[bool]:
        """Return for each value whether it takes the bytes of its node. False: the slower checks have to decide."""
        if PLAIN.issuperset(map(type, values)) and {int}.issuperset(map(type, nodes)):  # most
            return self._among_tensors(nodes, values)
        is_tensor = [type(node) is int and type(value) in PLAIN for node, value in zip(nodes, values, strict=True)]
        answers = iter(self._among_tensors(list(compress(nodes, is_tensor)), list(compress(values, is_tensor))))
        return [one and next(answers) for one in is_tensor]

    def _among_tensors(self, indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[bool]:
        wanted = list(map(self._wanted.__getitem__, map(self._codes.__getitem__, indices)))
        return _are_as_wanted(wanted, tensors)


def _wanted_for(kind: ItemKind) -> _Wanted:
    try:
        dtype = dtype_of(kind.dtype) if kind.kind == "tensor" else None
    except ValueError:  # of a newer torch
        dtype = None
    # The values of a conjugate view are not its bytes. Only complex tensors can be one, and they are rare.
    if dtype is None or dtype.is_complex or kind.stride != contiguous_stride(kind.shape):
        return _Wanted(_NO_TENSOR, 0, 0)
    shape = torch.Size(kind.shape)
    return _Wanted((True, torch.strided, dtype, shape), dtype.itemsize, shape.numel() * dtype.itemsize)


def _are_as_wanted(wanted: Sequence[_Wanted], tensors: Sequence[torch.Tensor]) -> list[bool]:
    try:
        answers = list(map(eq, map(_description, tensors), map(_wanted_description, wanted)))
        if all(answers):
            return _have_their_memory(wanted, tensors)
        checked = iter(_have_their_memory(compress(wanted, answers), list(compress(tensors, answers))))
        return [one and next(checked) for one in answers]
    except RuntimeError:  # one of them has no shape or no memory: a nested tensor, a tensor of torch.func
        if len(tensors) == 1:
            return [False]
        half = len(tensors) // 2
        return _are_as_wanted(wanted[:half], tensors[:half]) + _are_as_wanted(wanted[half:], tensors[half:])


def _have_their_memory(wanted: Iterable[_Wanted], tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return for each tensor whether its elements are in C order in its storage, which may have been freed."""
    kind = torch.Tensor
    columns = zip(
        wanted,
        map(kind.is_contiguous, tensors),
        map(kind.is_neg, tensors),
        map(hasattr, tensors, repeat("global_shape")),
        map(kind.storage_offset, tensors),
        map(torch.UntypedStorage.nbytes, map(kind.untyped_storage, tensors)),
        strict=True,
    )
    return [
        in_order and not (is_negative or is_marked) and offset * itemsize + nbytes <= held
        for (_, itemsize, nbytes), in_order, is_negative, is_marked, offset, held in columns
    ]
