"""Stand-ins: tensors without memory, in place of tensors on the meta device or of a rank's shards.

The planner looks at addresses, dtypes, shapes and strides, never at values. Stand-ins have all of these. They lie in one
anonymous mapping that nobody touches, so the kernel never allocates a page for it, even if it has terabytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from stager.state.state_tree import StateTree
from stager.workers.checkpoint.layout.layout import align
from stager.workers.errors import UsageError
from stager.workers.memory.slab import Slab


def with_stand_ins(flat: StateTree, num_shards: int = 1) -> StateTree:
    """Return the state tree with a stand-in, a tensor without memory, in the place of each tensor.

    With several shards, a stand-in has the shape of the shard on the first of ``num_shards`` ranks. Tensors are sharded as
    FSDP2 does: along the first dimension, with the larger shards on the first ranks, and scalars on every rank. A state
    that is neither sharded nor on the meta device is returned as it is.
    """
    if num_shards > 1:
        return _replaced(flat, lambda tensor: _shard(tensor, num_shards))
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in flat.leaves):
        return _replaced(flat, lambda tensor: tensor)
    return flat


def _shard(tensor: torch.Tensor, num_shards: int) -> torch.Tensor:
    """Make the first rank's shard of a tensor, on the meta device, with a storage of its own."""
    shape = list(tensor.shape)
    if shape:
        shape[0] = -(-shape[0] // num_shards)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _replaced(flat: StateTree, model_of: Callable[[torch.Tensor], torch.Tensor]) -> StateTree:
    """Replace each tensor by a stand-in like its model, which ``model_of`` makes on the meta device."""
    models: dict[int, torch.Tensor] = {}  # by leaf; tied tensors stay one
    same: dict[tuple[Any, ...], torch.Tensor] = {}
    for leaf, value in enumerate(flat.leaves):
        if isinstance(value, torch.Tensor) and _has_storage(value):
            view = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
            models[leaf] = same.setdefault(view, model_of(value))
    places, total = _place(list(models.values()))
    memory = _reserve(total)
    leaves = [_over(memory, places, models[i]) if i in models else leaf for i, leaf in enumerate(flat.leaves)]
    return StateTree(leaves=leaves, structure=flat.structure, odd_keys=flat.odd_keys)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _place(models: list[torch.Tensor]) -> tuple[dict[int, int], int]:
    """Return the offset of each storage in the mapping, by the storage's identity, and the size of the mapping."""
    places: dict[int, int] = {}
    total = 0
    for model in models:
        storage = model.untyped_storage()
        if storage._cdata not in places:
            places[storage._cdata] = total
            total = align(total + storage.nbytes())
    return places, total


def _reserve(nbytes: int) -> torch.UntypedStorage:
    try:
        return Slab.create(nbytes).storage
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not map it
        raise UsageError(
            f"no address space for a state of {nbytes:,} bytes ({error}); raise `ulimit -v`, or plan a part of the state"
        ) from error


def _over(memory: torch.UntypedStorage, places: dict[int, int], model: torch.Tensor) -> torch.Tensor:
    """Make a tensor like ``model`` over the mapping, at the place of the model's storage."""
    offset = places[model.untyped_storage()._cdata] // model.itemsize + model.storage_offset()
    with warnings.catch_warnings():  # "ComplexHalf support is experimental": nothing is computed with it
        warnings.simplefilter("ignore")
        tensor: torch.Tensor = torch.empty(0, dtype=model.dtype, device="cpu").set_(
            memory, offset, model.size(), model.stride()
        )
        if model.is_conj():
            tensor = tensor.conj()
        return torch._neg_view(tensor) if model.is_neg() else tensor
