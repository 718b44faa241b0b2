"""What a snapshot's plan depends on, of every leaf, read fast enough to be checked in full on every save.

One column per property, each read by ``map`` over a method of ``torch.Tensor``: no Python code runs per tensor, which makes
20,000 tensors cost about 15 ms instead of 45. Sources are identified by address, not by object: ``nn.Module.state_dict()``
makes new tensor objects every time, and nothing of the user's is kept alive between saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.flatten import Flat
from workers.errors import UnstageableError

_Tensor: Any = torch.Tensor  # its methods and descriptors are called unbound, which the stubs do not know

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Of one tensor.

    Attributes:
        address: of its first element, on its device.
        dtype, shape, stride, device: as torch has them.
        is_lazy: a conjugate or negative view: its memory does not hold its values.
    """

    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    is_lazy: bool

    @property
    def nbytes(self) -> int:
        """Of the elements, each counted once: bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Columns:
    """The fingerprints of the tensors of a state, by column. Equal columns mean equal plans.

    Attributes:
        leaves: the leaves that are tensors to be copied; all others are pickled.
        devices: None when every tensor is in host memory.
        lazy: None when no tensor is a conjugate or negative view.
    """

    leaves: Sequence[int]
    addresses: list[int]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    devices: list[torch.device] | None
    lazy: list[bool] | None

    def rows(self) -> list[tuple[int, Fingerprint]]:
        """(leaf, fingerprint) of each tensor."""
        count = len(self.leaves)
        devices = self.devices or [torch.device("cpu")] * count
        lazy = self.lazy or [False] * count
        columns = zip(self.addresses, self.dtypes, self.shapes, self.strides, devices, lazy, strict=True)
        return [(leaf, Fingerprint(*row)) for leaf, row in zip(self.leaves, columns, strict=True)]


def read_columns(flat: Flat) -> Columns:
    """
    Raises:
        UnstageableError: a tensor that cannot be snapshotted, with its key path.
    """
    leaves = flat.leaves
    if _PLAIN_TYPES.issuperset(map(type, leaves)):
        numbers: Sequence[int] = range(len(leaves))
        tensors = leaves
    else:
        numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in numbers]
        if not _PLAIN_TYPES.issuperset(map(type, tensors)):
            _refuse_wrappers(flat, numbers)
    try:
        columns = _read(numbers, tensors)
        if not _has_unusual(columns):
            return columns
    except (RuntimeError, NotImplementedError):  # sparse, nested and the like have no address or strides
        pass
    numbers = [i for i in numbers if _is_plain(leaves[i])]
    return _read(numbers, [leaves[i] for i in numbers])


def _read(numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> Columns:
    dtypes = [tensor.dtype for tensor in tensors]
    on_host = all(map(_Tensor.is_cpu.__get__, tensors))
    lazy = list(map(_Tensor.is_neg, tensors))
    if any(dtype.is_complex for dtype in set(dtypes)):
        lazy = [tensor.is_conj() or neg for tensor, neg in zip(tensors, lazy, strict=True)]
    return Columns(
        leaves=numbers,
        addresses=list(map(_Tensor.data_ptr, tensors)),
        dtypes=dtypes,
        shapes=list(map(_Tensor.size, tensors)),
        strides=list(map(_Tensor.stride, tensors)),
        devices=None if on_host else [tensor.device for tensor in tensors],
        lazy=lazy if any(lazy) else None,
    )


def _has_unusual(columns: Columns) -> bool:
    """Quantized tensors have addresses, but their bytes are not all they are; meta tensors have none behind theirs."""
    if any(str(dtype).startswith("torch.q") for dtype in set(columns.dtypes)):
        return True
    return columns.devices is not None and any(device.type == "meta" for device in set(columns.devices))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is bytes and strides; all others are rare, and torch.save keeps them exactly."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)


def _refuse_wrappers(flat: Flat, numbers: Sequence[int]) -> None:
    for leaf in numbers:
        tensor = flat.leaves[leaf]
        if type(tensor) not in _PLAIN_TYPES and _is_wrapper(tensor):
            raise UnstageableError(
                flat.name(leaf),
                f"is a {type(tensor).__name__}; sharded and wrapper tensors cannot be saved yet: "
                "save its local or full tensor",
            )


def _is_wrapper(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
