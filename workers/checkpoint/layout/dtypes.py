"""dtypes by the names that stand in plans and manifests, and tensors over memory that is there."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_SMALL_BYTES = 64 << 10

_untyped: Any = torch.UntypedStorage  # its constructor has no types

# Only what is a dtype of torch's own: a name comes from a file, and ``getattr(torch, name)`` would import whatever it says.
# Quantized dtypes need more than raw bytes; such tensors are saved as objects.
_BY_NAME = {
    name: value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not (name := str(value).removeprefix("torch.")).startswith("q")
}


def name_of(dtype: torch.dtype) -> str:
    """``float32``, as it stands in manifests."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype called ``name`` ("float32").

    Raises:
        ValueError: this torch has none of that name whose tensors are raw bytes.
    """
    dtype = _BY_NAME.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r}")
    return dtype


def tensor_over(
    storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A tensor over CPU memory; ``torch.empty_strided`` would ask the default device and fill it in deterministic mode."""
    if dtype is not torch.complex32:
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)
    with warnings.catch_warnings():  # "ComplexHalf support is experimental": moving its bytes is not
        warnings.simplefilter("ignore")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


def new_tensor(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], nbytes: int) -> torch.Tensor:
    """A dense CPU tensor over ``nbytes`` bytes of new memory, not initialised."""
    if nbytes < _SMALL_BYTES and dtype is not torch.complex32:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")  # half the time, and nothing to fill
    return tensor_over(_untyped(nbytes, device="cpu"), dtype, shape, stride)
