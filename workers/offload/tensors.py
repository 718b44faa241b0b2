"""How each kind of tensor is taken apart into storages and rebuilt on the CPU.

A copy is exact, bit for bit, with its layout, strides, offset and aliasing; if that is impossible, LocatedError is raised.
Gradients, hooks and autograd history are not part of a tensor's saved state (``torch.save`` leaves them out, too).
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

import copyreg
import sys
from typing import Any, Protocol

import torch

from stager.workers.offload.key_path import LocatedError, at_attribute

Memo = dict[int, Any]
_HAS_NAMES = getattr(torch.Tensor, "has_names", None)  # named dimensions: gone from newer torch
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Copier(Protocol):
    """What rebuilding needs from the engine."""

    def _copy(self, x: Any, memo: Memo, non_blocking: bool) -> Any: ...
    def _staged_storage(
        self, storage: torch.UntypedStorage, memo: Memo, non_blocking: bool
    ) -> torch.UntypedStorage: ...


def offload_tensor(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    """A CPU tensor equal to ``x`` over staged storages, already in ``memo``. Raises LocatedError."""
    if type(x) is torch.Tensor:
        y = _rebuild(copier, x, memo, non_blocking)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            y = _rebuild_subclass(copier, x, memo, non_blocking)
            x._clear_non_serializable_cached_data()  # handles that the class makes anew on demand
    memo[id(x)] = y  # before the attributes: they may refer to the tensor
    _copy_attributes(copier, x, y, memo, non_blocking)
    return y


def _rebuild(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    if x.layout is not torch.strided:
        y = _rebuild_sparse(copier, x, memo, non_blocking)
    elif x.is_nested:
        y = _rebuild_nested(copier, x, memo, non_blocking)
    elif not torch._C._has_storage(x):
        raise LocatedError(
            f"a {type(x).__name__} on device {x.device} has no storage that could be copied; "
            "convert it to a plain tensor, or leave it out of the state"
        )
    elif x.is_quantized:
        y = _rebuild_quantized(copier, x, memo, non_blocking)
    else:
        y = _rebuild_strided(copier, x, memo, non_blocking)
    if x.requires_grad and x.is_leaf:
        y.requires_grad_()
    return y


def _rebuild_strided(copier: Copier, x: Any, memo: Memo, non_blocking: bool) -> torch.Tensor:
    if _HAS_NAMES is not None and _HAS_NAMES(x):
        raise LocatedError("a tensor with named dimensions cannot be rebuilt exactly; use rename(None)")
    storage = x.untyped_storage()
    _check_extent(x, storage)
    staged = copier._staged_storage(storage, memo, non_blocking)
    y: Any = torch.empty(0, dtype=x.dtype, device=staged.device)
    y.set_(staged, x.storage_offset(), x.size(), x.stride())
    if x.is_conj():
        torch._C._set_conj(y, True)
    if x.is_neg():
        torch._C._set_neg(y, True)
    rebuilt: torch.Tensor = y
    return rebuilt


def _check_extent(x: torch.Tensor, storage: torch.UntypedStorage) -> None:
    """Refuse a tensor whose storage is too small: FSDP and others free a parameter by resizing its storage to nothing."""
    if x.is_contiguous():
        needed = (x.storage_offset() + x.numel()) * x.element_size() if x.numel() else 0
    elif x.numel() == 0:
        return
    else:
        last = sum((size - 1) * stride for size, stride in zip(x.size(), x.stride(), strict=True))
        needed = (x.storage_offset() + last + 1) * x.element_size()
    if storage.nbytes() < needed:
        raise LocatedError(
            f"its storage holds {storage.nbytes()} bytes, and the tensor needs {needed}: the storage was freed or resized, "
            "by FSDP for instance; take the state dict with torch.distributed.checkpoint.state_dict.get_state_dict()"
        )


def _rebuild_quantized(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    scheme = x.qscheme()
    y: Any
    if scheme == torch.per_tensor_affine:
        scale, zero_point = x.q_scale(), x.q_zero_point()
        y = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=x.dtype, device="cpu")
    elif scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        scales = copier._copy(x.q_per_channel_scales(), memo, non_blocking)
        zero_points = copier._copy(x.q_per_channel_zero_points(), memo, non_blocking)
        y = torch._empty_per_channel_affine_quantized(
            x.size(), scales=scales, zero_points=zero_points, axis=x.q_per_channel_axis(), dtype=x.dtype, device="cpu"
        )
    else:
        raise LocatedError(f"a quantized tensor of scheme {scheme} cannot be rebuilt exactly")
    storage = x.untyped_storage()
    _check_extent(x, storage)
    staged = copier._staged_storage(storage, memo, non_blocking)
    rebuilt: torch.Tensor = y.set_(staged, x.storage_offset(), x.size(), x.stride())
    return rebuilt


def _rebuild_sparse(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    if x.layout is torch.sparse_coo:
        indices = copier._copy(x._indices(), memo, non_blocking)
        values = copier._copy(x._values(), memo, non_blocking)
        return torch.sparse_coo_tensor(
            indices, values, x.size(), dtype=x.dtype, check_invariants=False, is_coalesced=x.is_coalesced()
        )
    if x.layout not in _COMPRESSED:
        raise LocatedError(f"a tensor of layout {x.layout} cannot be rebuilt exactly; convert it with to_dense()")
    by_row = x.layout in (torch.sparse_csr, torch.sparse_bsr)
    outer, inner = (x.crow_indices(), x.col_indices()) if by_row else (x.ccol_indices(), x.row_indices())
    parts = [copier._copy(part, memo, non_blocking) for part in (outer, inner, x.values())]
    rebuild: Any = torch.sparse_compressed_tensor  # its stub knows only the call with the size left out
    y: torch.Tensor = rebuild(*parts, x.size(), dtype=x.dtype, layout=x.layout, check_invariants=False)
    return y


def _rebuild_nested(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    """Rebuild a strided nested tensor: one buffer, and three small tensors that say where each part lies in it."""
    buffer = copier._copy(x.detach().values(), memo, non_blocking)
    sizes, strides, offsets = (
        copier._copy(part, memo, non_blocking)
        for part in (x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets())
    )
    y: torch.Tensor = torch._utils._rebuild_nested_tensor(buffer, sizes, strides, offsets)
    return y


def _rebuild_subclass(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    cls = type(x)
    sharded = sys.modules.get("torch.distributed._shard.sharded_tensor")
    if sharded is not None and isinstance(x, sharded.ShardedTensor):
        raise LocatedError("a ShardedTensor cannot be rebuilt exactly; use DTensor")
    if hasattr(x, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__"):
        return _rebuild_wrapper(copier, x, memo, non_blocking)
    if not _holds_data(x):
        raise LocatedError(
            f"a {cls.__name__} wraps other tensors without naming them; define __tensor_flatten__ and "
            "__tensor_unflatten__ in it"
        )
    y = _rebuild(copier, x, memo, non_blocking)
    return torch.Tensor._make_subclass(cls, y, y.requires_grad)


def _holds_data(x: torch.Tensor) -> bool:
    """Whether the tensor's own storage holds its data. That of a wrapper subclass does not."""
    if type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return True
    try:
        storage = x.untyped_storage()
        return storage.device.type != "meta" and storage.data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _rebuild_wrapper(copier: Copier, x: Any, memo: Memo, non_blocking: bool) -> torch.Tensor:
    names, context = x.__tensor_flatten__()
    inner = {}
    for name in names:
        value = getattr(x, name)
        try:  # a part that is no tensor (a DTensor's device mesh) is shared, as torch.compile shares it
            inner[name] = copier._copy(value, memo, non_blocking) if isinstance(value, torch.Tensor) else value
        except LocatedError as error:
            error.prepend(at_attribute(name))
            raise
    y: torch.Tensor = type(x).__tensor_unflatten__(inner, context, x.size(), x.stride())
    if not _same_size(x.size(), y.size()):
        raise LocatedError(
            f"{type(x).__name__}.__tensor_unflatten__ returned a tensor of size {tuple(y.size())} "
            f"for one of size {tuple(x.size())}"
        )
    if x.requires_grad and x.is_leaf and not y.requires_grad:
        y.requires_grad_()
    return y


def _same_size(one: torch.Size, other: torch.Size) -> bool:
    """Compare sizes, without ragged dimensions: these are symbols of the offsets tensor, and its copy has its own."""
    return len(one) == len(other) and all(a == b for a, b in zip(one, other, strict=True) if isinstance(a, int))


def _copy_attributes(copier: Copier, x: torch.Tensor, y: torch.Tensor, memo: Memo, non_blocking: bool) -> None:
    """Copy the attributes that the user set. Rebuilding may have set some already: those stay."""
    attributes: dict[str, Any] = {}
    if type(x) is not torch.Tensor:
        for slot in copyreg._slotnames(type(x)):  # type: ignore[attr-defined]  # what copyreg itself uses
            if hasattr(x, slot):
                attributes[slot] = getattr(x, slot)
    attributes.update(x.__dict__)
    for name, value in attributes.items():
        if name in y.__dict__ or (name not in x.__dict__ and hasattr(y, name)):
            continue
        try:
            setattr(y, name, copier._copy(value, memo, non_blocking))
        except LocatedError as error:
            error.prepend(at_attribute(name))
            raise
