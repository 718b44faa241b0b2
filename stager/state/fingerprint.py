"""Fingerprints: the properties of each tensor on which a snapshot's plan depends, all read again on every save.

Properties are read column by column, each by ``map`` over a method of ``torch.Tensor``. So no Python code runs per tensor,
and 20,000 tensors cost about 15 ms instead of 45. Sources are identified by address and not by object, because
``nn.Module.state_dict()`` makes new tensor objects every time. Nothing of the user's is kept alive between saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch

from stager.state.state_tree import StateTree
from stager.state.tensor_kinds import BLOCK, PLAIN_TENSORS
from stager.state.tensor_table import MemoryKind, TensorTable
from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.errors import UnstageableError
from stager.workers.memory.tensor_memory import problem_of

_Tensor: Any = torch.Tensor  # its methods are called unbound, which the stubs do not know
_is_on_host: Any = attrgetter("is_cpu")
_shape: Any = attrgetter("shape")

_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The fingerprints of some consecutive tensors, one column per property.

    Attributes:
        devices: None when all are in host memory.
        lazy: None when none is a conjugate or negative view.
        held: bytes of each tensor's storage. A storage that was resized is told by it: see :func:`_check_storages`.
        is_row_major: whether all are, and no dimension is 0 or 1 long. Then the shapes leave no choice of strides.
    """

    addresses: Any
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    devices: list[torch.device] | None
    lazy: list[bool] | None
    held: Any
    is_row_major: bool

    def is_as(self, last: _Block) -> bool:
        """Tell whether nothing has changed."""
        return (
            np.array_equal(self.addresses, last.addresses)
            and np.array_equal(self.held, last.held)
            and self.dtypes == last.dtypes
            and self.shapes == last.shapes
            and self.strides == last.strides
            and self.devices == last.devices
            and self.lazy == last.lazy
        )

    def to_keep(self, known: dict[Any, Any]) -> _Block:
        """Return the block with one object for all equal shapes, and one for all equal strides, to save memory.

        Args:
            known: shapes and strides of earlier blocks, by type, too: ``()`` equals ``torch.Size([])``.
        """
        shapes, strides = (
            [known.setdefault((type(one), one), one) for one in column] for column in (self.shapes, self.strides)
        )
        return replace(self, shapes=shapes, strides=strides)


@dataclass(frozen=True, slots=True)
class TensorMemory:
    """The storages of a state's tensors. They hold the memory, whatever becomes of the tensors.

    Attributes:
        leaves: numbers of the leaves that are tensors, as in :class:`Fingerprints`.
        storages: of these leaves.
    """

    leaves: Sequence[int] = ()
    storages: Sequence[torch.UntypedStorage] = ()


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The fingerprints of a state's tensors.

    Attributes:
        leaves: numbers of the leaves that are copied as tensors; all others are pickled.
        blocks: their fingerprints, in the same order.
    """

    leaves: Sequence[int]
    blocks: tuple[_Block, ...]

    def table(self) -> TensorTable:
        """Return them as the table that a plan is made from."""
        codes: list[int] = []
        kinds: dict[tuple[torch.dtype, torch.Size, tuple[int, ...]], int] = {}
        for block in self.blocks:
            of_block = list(zip(block.dtypes, block.shapes, block.strides, strict=True))
            for kind in dict.fromkeys(of_block):
                kinds.setdefault(kind, len(kinds))
            codes += map(kinds.__getitem__, of_block)
        found = {device for block in self.blocks for device in block.devices or ()} | {_HOST}
        devices = sorted(found, key=str)
        positions = {device: number for number, device in enumerate(devices)}
        on = [
            np.full(len(block.dtypes), positions[_HOST])
            if block.devices is None
            else np.array([positions[device] for device in block.devices])
            for block in self.blocks
        ]
        lazy = [np.array(block.lazy or [False] * len(block.dtypes), dtype=bool) for block in self.blocks]
        return TensorTable(
            leaves=np.array(self.leaves, dtype=np.int64),
            addresses=_joined([block.addresses for block in self.blocks]),
            kinds=[MemoryKind(*kind) for kind in kinds],
            codes=np.array(codes, dtype=np.int64),
            devices=devices,
            on=_joined(on),
            lazy=_joined(lazy).astype(bool),
        )


def _joined(columns: list[Any]) -> Any:
    return np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def read_fingerprints(tree: StateTree, known: Fingerprints | None = None) -> tuple[Fingerprints, TensorMemory]:
    """Read the fingerprints of all tensors of a state, and hold their memory: the storages are made here anyway.

    Args:
        known: the fingerprints of the save before. They are returned themselves if nothing has changed.

    Raises:
        UnstageableError: a tensor that cannot be snapshotted, with its key path.
    """
    leaves = tree.leaves
    numbers: Sequence[int] = range(len(leaves))
    tensors = leaves
    is_plain = PLAIN_TENSORS.issuperset(map(type, leaves))
    if not is_plain:
        numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in numbers]
        is_plain = PLAIN_TENSORS.issuperset(map(type, tensors))
    if is_plain:
        try:
            return _read(numbers, tensors, known)
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
        ):  # some of them are not just bytes and strides, or are not in memory
            pass
    numbers = [i for i in numbers if _is_raw(leaves[i], tree, i)]
    return _read(numbers, [leaves[i] for i in numbers], known)


def _read(
    numbers: Sequence[int], tensors: Sequence[torch.Tensor], known: Fingerprints | None
) -> tuple[Fingerprints, TensorMemory]:
    storages: list[torch.UntypedStorage] = []
    old = known.blocks if known is not None else ()
    blocks: list[_Block] = []
    kept: dict[Any, Any] = {}
    # In blocks, because each column touches every tensor again: those of a block stay in the processor's cache.
    for i, start in enumerate(range(0, len(tensors), BLOCK)):
        of_block = tensors[start : start + BLOCK]
        last = old[i] if i < len(old) else None
        block = _read_block(of_block, last, storages)
        if last is not None and block.is_as(last):
            block = last
        else:
            _check_storages(of_block, block, storages[start : start + BLOCK])
            block = block.to_keep(kept)
        blocks.append(block)
    if known is not None and len(old) == len(blocks) and known.leaves == numbers and all(map(is_, old, blocks)):
        return known, TensorMemory(numbers, storages)
    return Fingerprints(numbers, tuple(blocks)), TensorMemory(numbers, storages)


def _read_block(tensors: Sequence[torch.Tensor], last: _Block | None, held: list[torch.UntypedStorage]) -> _Block:
    """Read the fingerprints of some tensors.

    Args:
        last: what was read of them by the save before.
        held: gets their storages.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    devices = None if all(map(_is_on_host, tensors)) else [tensor.device for tensor in tensors]
    kinds = set(dtypes)
    if not kinds.isdisjoint(_QUANTIZED) or (devices is not None and any(d.type == "meta" for d in devices)):
        # Quantized tensors are more than their bytes, and meta tensors have none.
        raise NotImplementedError("quantized or meta tensors")
    lazy = list(map(_Tensor.is_neg, tensors))
    if any(dtype.is_complex for dtype in kinds):
        lazy = [tensor.is_conj() or neg for tensor, neg in zip(tensors, lazy, strict=True)]
    # Before the shapes: it raises if there are none, or no strides.
    addresses = _numbers(map(_Tensor.data_ptr, tensors), len(tensors))
    shapes = list(map(_shape, tensors))
    if last is not None and last.is_row_major and shapes == last.shapes and all(map(_Tensor.is_contiguous, tensors)):
        shapes, strides, is_row_major = last.shapes, last.strides, True
    else:
        strides = list(map(_Tensor.stride, tensors))
        is_row_major = all(map(_has_no_other_stride, *zip(*set(zip(shapes, strides, strict=True)), strict=True)))
    storages = list(map(_Tensor.untyped_storage, tensors))
    held += storages
    return _Block(
        addresses=addresses,
        dtypes=dtypes,
        shapes=shapes,
        strides=strides,
        devices=devices,
        lazy=lazy if any(lazy) else None,
        held=_numbers(map(torch.UntypedStorage.nbytes, storages), len(storages)),
        is_row_major=is_row_major,
    )


def _has_no_other_stride(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Tell whether a tensor of this shape that ``is_contiguous()`` has these strides, whatever else it is."""
    return 0 not in shape and 1 not in shape and stride == contiguous_stride(shape)


def _numbers(values: Iterable[int], count: int) -> Any:
    """Put integers into an array of signed ones of 8 bytes. Addresses from 2**63 on, of some devices, become negative."""
    return np.fromiter(values, dtype=np.uint64, count=count).view(np.int64)


def _check_storages(tensors: Sequence[torch.Tensor], block: _Block, storages: Sequence[torch.UntypedStorage]) -> None:
    """Check that each storage has all bytes of its tensor.

    Once per block is enough: torch makes no tensor that reaches beyond its storage, and a storage that is resized later
    changes ``held``. A functional tensor, which torch makes while it traces, says that it has a storage and has none.

    Raises:
        RuntimeError: one has not; nothing was read.
    """
    kinds = list(zip(block.dtypes, block.shapes, block.strides, strict=True))
    span_of = {kind: MemoryKind(*kind).span_nbytes for kind in set(kinds)}
    spans = _numbers(map(span_of.__getitem__, kinds), len(kinds))
    starts = _numbers(map(torch.UntypedStorage.data_ptr, storages), len(kinds))
    ends = block.addresses - starts + spans
    if ((spans > 0) & (ends > block.held)).any() or any(map(torch._is_functional_tensor, tensors)):
        raise RuntimeError("a tensor has elements beyond the end of its storage")


def _is_raw(tensor: torch.Tensor, tree: StateTree, leaf: int) -> bool:
    """Tell whether a tensor is bytes and strides. All others are rare; they are pickled, which keeps them exactly.

    Raises:
        UnstageableError: the tensor's values are not in memory.
    """
    try:
        problem = problem_of(tensor)
    except Exception as error:  # a class of the user's, when it is asked for its parts
        raise UnstageableError(
            tree.name(leaf),
            f"its class {type(tensor).__name__} raised {error!r} when it was asked for the tensors it is made of; nothing "
            "was saved. Correct the class, or leave the value out of the state",
        ) from error
    if problem is not None:
        raise UnstageableError(tree.name(leaf), problem)
    if type(tensor) not in PLAIN_TENSORS:
        return False
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
