"""Whether a stored value fits a tensor of the target; if not, the reason, in words for the user."""

from __future__ import annotations

from typing import Any

import torch

from stager.state.shards import is_sharded, problem_of_shard, shape_of
from stager.workers.checkpoint.layout.dtypes import dtype_of, name_of
from stager.workers.checkpoint.layout.items import ItemKind
from stager.workers.checkpoint.layout.structure import Path, describe
from stager.workers.memory.tensor_memory import problem_of

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
"""The classes of tensors whose memory holds their values, and nothing else does."""


def _is_all_there(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor certainly has its memory: it may have been freed, or never made."""
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # a tensor of torch.func
        return False
    return tensor.storage_offset() * tensor.itemsize + tensor.nbytes <= held


def obstacle(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be loaded into, whatever the item is; None if it can."""
    if tensor.is_meta:
        return "is on the meta device, which has no memory to load into; materialize it first (Module.to_empty)"
    if is_sharded(tensor):
        return problem_of_shard(tensor)
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided
    if not (plain and tensor.is_contiguous() and _is_all_there(tensor)):
        if (problem := problem_of(tensor)) is not None:
            return f"{problem.partition(';')[0]}; materialize the target before you load into it"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"is a {type(tensor).__name__}, which stager cannot load into; load into its local or full tensor"
    if tensor.layout is torch.strided and torch._debug_has_internal_overlap(tensor) == 1:
        return "is expanded, so several of its elements share memory; load into the tensor that it was expanded from"
    return None


def difference(item: ItemKind, tensor: torch.Tensor) -> str | None:
    """How an item differs from a tensor of the target; None if it fits."""
    if item.shape != shape_of(tensor):
        return shape_problem(item, tensor)
    if dtype_of(item.dtype) != tensor.dtype:
        return _dtype_problem(item.dtype, tensor)
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout} in the target and dense in the checkpoint"
    return None


def object_difference(loaded: Any, tensor: torch.Tensor, path: Path) -> str | None:
    """How an unpickled value differs from a tensor of the target; None if it fits."""
    problem = None
    if not isinstance(loaded, torch.Tensor):
        problem = f"is a tensor in the target and a {type(loaded).__name__} in the checkpoint"
    elif loaded.shape != tensor.shape:
        problem = f"has shape {list(tensor.shape)} in the target and {list(loaded.shape)} in the checkpoint"
    elif loaded.dtype != tensor.dtype:
        problem = _dtype_problem(name_of(loaded.dtype), tensor)
    elif loaded.layout != tensor.layout or loaded.is_quantized != tensor.is_quantized:
        problem = f"is {tensor.layout} in the target and {loaded.layout} in the checkpoint"
    elif not loaded.is_meta and not (hasattr(tensor, "__tensor_flatten__") and type(loaded) is type(tensor)):
        problem = obstacle(tensor)
    return None if problem is None else f"{describe(path)}: {problem}"


def shape_problem(item: ItemKind, tensor: torch.Tensor) -> str:
    """The message for an item of another shape than the tensor's."""
    return f"has shape {list(shape_of(tensor))} in the target and {list(item.shape)} in the checkpoint"


def _dtype_problem(dtype: str, tensor: torch.Tensor) -> str:
    return f"is {str(tensor.dtype).removeprefix('torch.')} in the target and {dtype} in the checkpoint"
