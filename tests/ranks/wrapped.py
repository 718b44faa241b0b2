"""A tensor that wraps one of its own shape, as torchao's ``WeightWithDynamicFloat8CastTensor`` does."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


class Wrapped(torch.Tensor):
    """Views and copies of it are wrapped, too; the result of any other operation is plain."""

    _inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, note: str, second: torch.Tensor | None = None) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]  # torch's stubs lack it
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: torch.Tensor, note: str, second: torch.Tensor | None = None) -> None:
        self._inner, self._note, self._second = inner, note, second

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_inner"] + ["_second"] * (self._second is not None), self._note

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], note: Any, size: Any, stride: Any) -> Wrapped:
        return Wrapped(inner["_inner"], note, inner.get("_second"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in pytree.tree_leaves(args) if isinstance(x, Wrapped)]
        args, kwargs = pytree.tree_map_only(Wrapped, lambda x: x._inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func not in _KEPT:
            return result
        second = given[0]._second
        return pytree.tree_map_only(torch.Tensor, lambda x: Wrapped(x, given[0]._note, second), result)


_ATEN = torch.ops.aten
_KEPT = {_ATEN.view.default, _ATEN.detach.default, _ATEN.clone.default, _ATEN.slice.Tensor, _ATEN.alias.default}
