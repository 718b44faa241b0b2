"""Whether what is in a checkpoint fits a tensor that is there, in words for the user."""

from __future__ import annotations

from typing import Any

import torch

from stager.state.shards import is_sharded
from stager.workers.checkpoint.layout.dtypes import dtype_of, name_of
from stager.workers.checkpoint.layout.layout import Item
from stager.workers.checkpoint.layout.structure import Path, describe

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def fits(item: Item, tensor: torch.Tensor) -> bool:
    """Whether there is certainly neither a difference nor an obstacle: a quick answer for most tensors."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and item.kind == "tensor"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.shape == item.shape
        and tensor.dtype is dtype_of(item.dtype)
    )


def obstacle(tensor: torch.Tensor) -> str | None:
    """Why nothing can be loaded into a tensor, whatever it is; None when it can."""
    if tensor.is_meta:
        return "is on the meta device, which has no memory to load into; materialize it first (Module.to_empty)"
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        return f"is a {type(tensor).__name__}; load into its local or full tensor"
    if tensor.layout is torch.strided and not is_sharded(tensor) and torch._debug_has_internal_overlap(tensor) == 1:
        return "is expanded: several of its elements are the same memory; load into what it was expanded from"
    return None


def difference(item: Item, tensor: torch.Tensor) -> str | None:
    """Why an item cannot be read into a tensor; None when it can."""
    if item.shape != tuple(tensor.shape):
        return shape_problem(item, tensor)
    if dtype_of(item.dtype) != tensor.dtype:
        return _dtype_problem(item.dtype, tensor)
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout} here and dense in the checkpoint"
    return None


def object_difference(loaded: Any, tensor: torch.Tensor, path: Path) -> str | None:
    """The same for a tensor that was pickled."""
    problem = None
    if not isinstance(loaded, torch.Tensor):
        problem = f"is a tensor here and a {type(loaded).__name__} in the checkpoint"
    elif loaded.shape != tensor.shape:
        problem = f"has shape {list(tensor.shape)} here and {list(loaded.shape)} in the checkpoint"
    elif loaded.dtype != tensor.dtype:
        problem = _dtype_problem(name_of(loaded.dtype), tensor)
    elif loaded.layout != tensor.layout or loaded.is_quantized != tensor.is_quantized:
        problem = f"is {tensor.layout} here and {loaded.layout} in the checkpoint"
    elif not loaded.is_meta:
        problem = obstacle(tensor)
    return None if problem is None else f"{describe(path)}: {problem}"


def shape_problem(item: Item, tensor: torch.Tensor) -> str:
    return f"has shape {list(tensor.shape)} here and {list(item.shape)} in the checkpoint"


def _dtype_problem(dtype: str, tensor: torch.Tensor) -> str:
    return f"is {str(tensor.dtype).removeprefix('torch.')} here and {dtype} in the checkpoint"
