"""Whether a tensor's values are in memory, all of them, before anything reads that memory.

A tensor can say that it has elements while its storage was freed (FSDP1 does that to its flat parameters), shrunk, or never
made (under ``FakeTensorMode`` and ``torch.func``). Reading it would end the process, or return memory of something else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_functorch: Any = torch._C._functorch
_is_functional: Any = torch._is_functional_tensor


def problem_of(tensor: torch.Tensor) -> str | None:
    """Say why a tensor's values cannot be read, and what to do; None if they can be."""
    if (problem := _problem_of_kind(tensor)) is not None:
        return problem
    for part in parts_of(tensor):
        problem = problem_of(part) if part is not tensor else _problem_of_storage(part)
        if problem is not None:
            return problem
    return None


def _problem_of_kind(tensor: torch.Tensor) -> str | None:
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return (
            "is a tensor of a running torch.func transform (vmap, grad, jvp, ...) and has no values of its own; "
            "save it after the transform has returned"
        )
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: there is no such tensor
    if (fake is not None and isinstance(tensor, fake.FakeTensor)) or _is_functional(tensor):
        return (
            f"is a {type(tensor).__name__}, made while torch was tracing: it has a shape and no values; "
            "make the object outside of FakeTensorMode"
        )
    return None


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """List the tensors that hold a tensor's values: itself, unless it is sparse or a wrapper of others."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _problem_of_storage(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta or tensor.layout is not torch.strided or torch.nn.parameter.is_lazy(tensor):
        return None
    try:
        storage = tensor.untyped_storage()
        held = storage.nbytes()
    except (RuntimeError, NotImplementedError) as error:  # some backend's own kind of tensor
        return f"is a {type(tensor).__name__} whose memory cannot be reached ({str(error).splitlines()[0]})"
    # A nested tensor has no strides, and elements of these quantized dtypes are smaller than a byte.
    is_counted = not (tensor.is_nested or tensor.dtype in (torch.quint4x2, torch.quint2x4))
    needed = storage_nbytes(tensor) if is_counted else 0
    if needed <= held:
        return None
    state = "was freed (as FSDP1 does with its flat parameters)" if held == 0 else f"has only {held:,} bytes"
    return (
        f"needs {needed:,} bytes of its storage, which {state}; "
        "save it while its storage has all its elements, for example through FSDP's own state_dict()"
    )


def storage_nbytes(tensor: torch.Tensor) -> int:
    """Count the bytes that a strided tensor needs of its storage, from the storage's first byte on."""
    if not tensor.numel():
        return 0
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize
