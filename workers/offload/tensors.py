"""How each kind of tensor is taken apart into storages and rebuilt on the CPU.

    take_apart(x) -> Pieces(rebuild, shared, parts)      parts: the storages and tensors that hold the values
    rebuild(shared, *copies of the parts)                a tensor like x over the copies

The deep copy (``copier.py``) and a packed state (``packed_state.py``) go this way. A copy is exact, bit for bit,
with its layout, strides, offset and aliasing; if that is impossible, LocatedError is raised. Gradients, hooks and autograd
history are not part of a tensor's saved state (``torch.save`` leaves them out, too).
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from stager.workers.offload.key_path import LocatedError, at_attribute

Memo = dict[int, Any]
_HAS_NAMES = getattr(torch.Tensor, "has_names", None)  # named dimensions: gone from newer torch
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Pieces(NamedTuple):
    """A tensor, taken apart: ``rebuild(shared, *parts)`` makes one like it.

    Attributes:
        rebuild: a function of this file.
        shared: what the copy has in common with the source: sizes, strides, the class, a wrapper's context.
        parts: storages and tensors that hold the values.
        names: of the parts, if they are attributes of a wrapper.
    """

    rebuild: Callable[..., torch.Tensor]
    shared: tuple[Any, ...]
    parts: tuple[Any, ...]
    names: tuple[str, ...] = ()


class Copier(Protocol):
    """What copying a tensor needs from the engine."""

    def _copy(self, x: Any, memo: Memo, non_blocking: bool) -> Any: ...
    def _staged_storage(
        self, storage: torch.UntypedStorage, memo: Memo, non_blocking: bool
    ) -> torch.UntypedStorage: ...


def offload_tensor(copier: Copier, x: torch.Tensor, memo: Memo, non_blocking: bool) -> torch.Tensor:
    """A CPU tensor equal to ``x`` over staged storages, already in ``memo``. Raises LocatedError."""
    if type(x) is torch.Tensor:
        y = _copy_pieces(copier, take_apart(x), memo, non_blocking)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            y = _copy_pieces(copier, take_apart(x), memo, non_blocking)
            x._clear_non_serializable_cached_data()  # handles that the class makes anew on demand
    memo[id(x)] = y  # before the attributes: they may refer to the tensor
    for name, value in attributes_to_copy(x, y):
        try:
            setattr(y, name, copier._copy(value, memo, non_blocking))
        except LocatedError as error:
            error.prepend(at_attribute(name))
            raise
    return y


def _copy_pieces(copier: Copier, pieces: Pieces, memo: Memo, non_blocking: bool) -> torch.Tensor:
    if pieces.rebuild is rebuild_strided:  # nearly all
        return rebuild_strided(pieces.shared, copier._staged_storage(pieces.parts[0], memo, non_blocking))
    if not pieces.names:
        return pieces.rebuild(pieces.shared, *[copier._copy(part, memo, non_blocking) for part in pieces.parts])
    copies = []
    for name, part in zip(pieces.names, pieces.parts, strict=True):
        try:
            copies.append(copier._copy(part, memo, non_blocking))
        except LocatedError as error:
            error.prepend(at_attribute(name))
            raise
    return pieces.rebuild(pieces.shared, *copies)


def attributes_to_copy(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that the user set on ``x``. Rebuilding ``y`` may have set some already: those stay."""
    if type(x) is not torch.Tensor:
        for slot in copyreg._slotnames(type(x)):  # type: ignore[attr-defined]  # what copyreg itself uses
            if hasattr(x, slot) and slot not in x.__dict__ and not hasattr(y, slot):
                yield slot, getattr(x, slot)
    for name, value in x.__dict__.items():
        if name not in y.__dict__:
            yield name, value


def take_apart(x: torch.Tensor) -> Pieces:
    """Take a tensor apart; of a subclass, without its ``__torch_function__``.

    Raises:
        LocatedError: it cannot be rebuilt exactly.
    """
    return _of_data(x) if type(x) is torch.Tensor else _of_subclass(x)


def _of_data(x: torch.Tensor) -> Pieces:
    if x.layout is not torch.strided:
        return _of_sparse(x)
    if x.is_nested:
        # One buffer, and three small tensors that say where each part lies in it.
        where = x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
        return Pieces(rebuild_nested, (_wants_grad(x),), (x.detach().values(), *where))
    if not torch._C._has_storage(x):
        raise LocatedError(
            f"a {type(x).__name__} on device {x.device} has no storage that could be copied; "
            "convert it, with to_dense() for example, or leave it out of the state"
        )
    if _HAS_NAMES is not None and _HAS_NAMES(x):
        raise LocatedError("a tensor with named dimensions cannot be rebuilt exactly; use rename(None)")
    storage = x.untyped_storage()
    _check_extent(x, storage)
    if x.is_quantized:
        return _of_quantized(x, storage)
    shared = (x.dtype, x.storage_offset(), tuple(x.size()), x.stride(), _wants_grad(x), x.is_conj(), x.is_neg())
    return Pieces(rebuild_strided, shared, (storage,))


def _wants_grad(x: torch.Tensor) -> bool:
    return x.requires_grad and x.is_leaf


def rebuild_strided(shared: tuple[Any, ...], storage: torch.UntypedStorage) -> torch.Tensor:
    """Make a tensor over a storage."""
    dtype, offset, size, stride, wants_grad, is_conj, is_neg = shared
    y: Any = torch.empty(0, dtype=dtype, device=storage.device)
    y.set_(storage, offset, size, stride)
    if is_conj:
        torch._C._set_conj(y, True)
    if is_neg:
        torch._C._set_neg(y, True)
    rebuilt: torch.Tensor = y.requires_grad_() if wants_grad else y
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


def _of_quantized(x: torch.Tensor, storage: torch.UntypedStorage) -> Pieces:
    scheme = x.qscheme()
    shared = x.dtype, x.storage_offset(), tuple(x.size()), x.stride(), _wants_grad(x)
    if scheme == torch.per_tensor_affine:
        return Pieces(rebuild_quantized, (*shared, x.q_scale(), x.q_zero_point()), (storage,))
    if scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        parts = storage, x.q_per_channel_scales(), x.q_per_channel_zero_points()
        return Pieces(rebuild_quantized_by_channel, (*shared, x.q_per_channel_axis()), parts)
    raise LocatedError(f"a quantized tensor of scheme {scheme} cannot be rebuilt exactly")


def rebuild_quantized(shared: tuple[Any, ...], storage: torch.UntypedStorage) -> torch.Tensor:
    """Make a tensor that is quantized with one scale."""
    dtype, offset, size, stride, wants_grad, scale, zero_point = shared
    y: Any = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=dtype, device=storage.device)
    rebuilt: torch.Tensor = y.set_(storage, offset, size, stride)
    return rebuilt.requires_grad_() if wants_grad else rebuilt


def rebuild_quantized_by_channel(
    shared: tuple[Any, ...], storage: torch.UntypedStorage, scales: torch.Tensor, zero_points: torch.Tensor
) -> torch.Tensor:
    """Make a tensor that is quantized with a scale for each channel."""
    dtype, offset, size, stride, wants_grad, axis = shared
    y: Any = torch._empty_per_channel_affine_quantized(
        size, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=storage.device
    )
    rebuilt: torch.Tensor = y.set_(storage, offset, size, stride)
    return rebuilt.requires_grad_() if wants_grad else rebuilt


def _of_sparse(x: torch.Tensor) -> Pieces:
    shared = tuple(x.size()), x.dtype, _wants_grad(x)
    if x.layout is torch.sparse_coo:
        return Pieces(rebuild_sparse, (*shared, x.is_coalesced()), (x._indices(), x._values()))
    if x.layout not in _COMPRESSED:
        raise LocatedError(f"a tensor of layout {x.layout} cannot be rebuilt exactly; convert it with to_dense()")
    by_row = x.layout in (torch.sparse_csr, torch.sparse_bsr)
    outer, inner = (x.crow_indices(), x.col_indices()) if by_row else (x.ccol_indices(), x.row_indices())
    return Pieces(rebuild_compressed, (*shared, x.layout), (outer, inner, x.values()))


def rebuild_sparse(shared: tuple[Any, ...], indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Make a sparse tensor in coordinate format."""
    size, dtype, wants_grad, is_coalesced = shared
    y = torch.sparse_coo_tensor(indices, values, size, dtype=dtype, check_invariants=False, is_coalesced=is_coalesced)
    return y.requires_grad_() if wants_grad else y


def rebuild_compressed(
    shared: tuple[Any, ...], outer: torch.Tensor, inner: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Make a sparse tensor in a format compressed by rows or columns."""
    size, dtype, wants_grad, layout = shared
    rebuild: Any = torch.sparse_compressed_tensor  # its stub knows only the call with the size left out
    y: torch.Tensor = rebuild(outer, inner, values, size, dtype=dtype, layout=layout, check_invariants=False)
    return y.requires_grad_() if wants_grad else y


def rebuild_nested(
    shared: tuple[Any, ...], buffer: torch.Tensor, sizes: torch.Tensor, strides: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Make a strided nested tensor."""
    (wants_grad,) = shared
    y: torch.Tensor = torch._utils._rebuild_nested_tensor(buffer, sizes, strides, offsets)
    return y.requires_grad_() if wants_grad else y


def _of_subclass(x: torch.Tensor) -> Pieces:
    cls = type(x)
    sharded = sys.modules.get("torch.distributed._shard.sharded_tensor")
    if sharded is not None and isinstance(x, sharded.ShardedTensor):
        raise LocatedError("a ShardedTensor cannot be rebuilt exactly; use DTensor")
    if hasattr(x, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__"):
        return _of_wrapper(x)
    if not _holds_data(x):
        raise LocatedError(
            f"a {cls.__name__} wraps other tensors without naming them; define __tensor_flatten__ and "
            "__tensor_unflatten__ in it"
        )
    inner = _of_data(x)
    return Pieces(rebuild_subclass, (cls, inner.rebuild, inner.shared), inner.parts)


def rebuild_subclass(shared: tuple[Any, ...], *parts: Any) -> torch.Tensor:
    """Make a tensor of a subclass that holds its data itself, ``nn.Parameter`` for example."""
    cls, rebuild, of_data = shared
    plain: torch.Tensor = rebuild(of_data, *parts)
    y: torch.Tensor = torch.Tensor._make_subclass(cls, plain, plain.requires_grad)
    return y


def _holds_data(x: torch.Tensor) -> bool:
    """Whether the tensor's own storage holds its data. That of a wrapper subclass does not."""
    if type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return True
    try:
        storage = x.untyped_storage()
        return storage.device.type != "meta" and storage.data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _of_wrapper(x: Any) -> Pieces:
    names, context = x.__tensor_flatten__()
    values = {name: getattr(x, name) for name in names}
    # A part that is no tensor (a DTensor's device mesh) is shared, as torch.compile shares it.
    others = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
    parts = {name: value for name, value in values.items() if name not in others}
    shared = type(x), tuple(parts), others, context, x.size(), x.stride(), _wants_grad(x)
    return Pieces(rebuild_wrapper, shared, tuple(parts.values()), tuple(parts))


def rebuild_wrapper(shared: tuple[Any, ...], *parts: torch.Tensor) -> torch.Tensor:
    """Make a tensor of a subclass that wraps others, by its ``__tensor_unflatten__``."""
    cls, names, others, context, size, stride, wants_grad = shared
    y: torch.Tensor = cls.__tensor_unflatten__(
        {**dict(zip(names, parts, strict=True)), **others}, context, size, stride
    )
    if not _same_size(size, y.size()):
        raise LocatedError(
            f"{cls.__name__}.__tensor_unflatten__ returned a tensor of size {tuple(y.size())} "
            f"for one of size {tuple(size)}"
        )
    return y.requires_grad_() if wants_grad and not y.requires_grad else y


def _same_size(one: torch.Size, other: torch.Size) -> bool:
    """Compare sizes, without ragged dimensions: these are symbols of the offsets tensor, and its copy has its own."""
    return len(one) == len(other) and all(a == b for a, b in zip(one, other, strict=True) if isinstance(a, int))
