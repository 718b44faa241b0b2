"""Torch dtypes by the names that plans and manifests use, and tensors over memory that exists already."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_SMALL_BYTES = 64 << 10

_untyped: Any = torch.UntypedStorage  # its constructor has no types

# A fixed table: names come from files, and ``getattr(torch, name)`` would import whatever a hostile file names.
# Quantized dtypes are left out: they need more than raw bytes, so their tensors are saved as objects.
_BY_NAME = {
    name: value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not (name := str(value).removeprefix("torch.")).startswith("q")
}

# torch warns when it makes a tensor of these: their operators are experimental. Moving their bytes is not.
_WARNED_OF = frozenset(dtype for name, dtype in _BY_NAME.items() if name in ("complex32", "bcomplex32"))


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype as manifests have it: ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype called ``name`` ("float32").

    Raises:
        ValueError: this torch has no dtype of that name, or its tensors are more than raw bytes.
    """
    dtype = _BY_NAME.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r}; load the checkpoint with a newer torch")
    return dtype


def new_storage(nbytes: int) -> torch.UntypedStorage:
    """Make a storage of uninitialised CPU memory, whatever the default device is."""
    storage: torch.UntypedStorage = _untyped(nbytes, device="cpu")
    return storage


def tensor_over(
    storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Make a tensor over CPU memory.

    Not ``torch.empty_strided``: it would use the default device, and in deterministic mode overwrite the memory.
    """
    if dtype not in _WARNED_OF:
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


def new_tensor(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], nbytes: int) -> torch.Tensor:
    """Make a dense CPU tensor over ``nbytes`` bytes of new, uninitialised memory."""
    if nbytes < _SMALL_BYTES and dtype not in _WARNED_OF:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")  # half the time, and nothing to fill
    return tensor_over(new_storage(nbytes), dtype, shape, stride)
