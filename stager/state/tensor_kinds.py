"""What a tensor is beside its values, as ``torch.save`` keeps it: parameter, requires_grad, class, attributes.

    plain                              an ``int`` in the structure: nothing is noted
    a parameter, one with grad         flags (:mod:`stager.workers.checkpoint.layout.tensor_node`)
    attributes, or a class of its own  a :class:`TensorRecipe` beside the values, so that these are streamed like any
                                       others, and readers of the format find them under the tensor's own name.
                                       In a format without recipes the tensor is a :class:`WholeTensor`
    a class that pickles itself        pickled whole, as are sparse, quantized and nested tensors

A DTensor has no flags: a fresh load returns the whole tensor, which is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from stager.workers.gc_pause import no_collection

PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
"""The plain-tensor test: tensors of these types are nothing but their bytes, unless their layout says otherwise."""

BLOCK = 1024
"""So many tensors are read at a time, property by property."""

_Tensor: Any = torch.Tensor
_requires_grad: Any = attrgetter("requires_grad")
# A tensor's attributes, if it has any. To ask for its __dict__ makes one: 20,000 of them cost more than the rest of a plan.
_attributes: Any = getattr(object, "__getstate__", None) or _Tensor.__dict__["__dict__"].__get__  # Python 3.10 lacks it
_FROM_TYPE: Any = torch._tensor._rebuild_from_type_v2
_FROM_STATE: Any = torch._utils._rebuild_parameter_with_state
_PARAMETER: Any = torch._utils._rebuild_parameter
_FROM_STORAGE: Any = (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3)


class TensorRecipe(NamedTuple):
    """A leaf: what is kept of a tensor beside its values and flags. Stored as a plain tuple.

    Attributes:
        kind: its class; None for a tensor or a parameter.
        state: its attributes, as ``__getstate__`` returns them.
    """

    kind: type | None
    state: Any

    def without_attributes(self) -> TensorRecipe:
        """Return the recipe of a tensor that has none."""
        return TensorRecipe(self.kind, None)


class WholeTensor:
    """A leaf: a tensor that is pickled whole, although its class says that it is plain, or that it has values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = self.tensor
        return tensor.__reduce_ex__(protocol)


_FLAGS: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {},
    (False, True): {"requires_grad": True},
    (True, False): {"parameter": True},
    (True, True): {"parameter": True, "requires_grad": True},
}


def nodes_of(values: Sequence[Any], first: int) -> list[Any] | None:
    """Return the nodes of plain tensors; None if some value is something else.

    Args:
        first: number of the first value's leaf.
    """
    # In columns: Python code per tensor would be too slow, and most states have plain tensors only. In blocks, because each
    # column touches every tensor again: those of a block stay in the processor's cache.
    kinds = set(map(type, values))
    if not kinds <= PLAIN_TENSORS:
        return None
    has_flags = torch.nn.Parameter in kinds
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        if any(map(_attributes, block)):
            return None
        has_flags = has_flags or any(map(_requires_grad, block))
    numbers = range(first, first + len(values))
    if not has_flags:
        return list(numbers)
    flags = [_FLAGS[type(value) is torch.nn.Parameter, value.requires_grad] for value in values]
    with no_collection():  # as many lists as tensors
        return [["tensor", number, some] if some else number for number, some in zip(numbers, flags, strict=True)]


def node_of(number: int, tensor: torch.Tensor) -> Any:
    """Return the node of a plain tensor: the number of its leaf, with flags if need be."""
    flags = flags_of(tensor, is_parameter=type(tensor) is torch.nn.Parameter)
    return ["tensor", number, flags] if flags else number


def flags_of(tensor: torch.Tensor, *, is_parameter: bool) -> dict[str, Any]:
    """Return the flags of a tensor; ``is_parameter`` says whether it comes back as a parameter. Do not modify them."""
    return _FLAGS[is_parameter, _requires_grad(tensor)]


def has_more(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a class of its own, or attributes."""
    return type(tensor) not in PLAIN_TENSORS or bool(_attributes(tensor))


def recipe_of(tensor: Any) -> tuple[TensorRecipe, bool] | None:
    """Return what ``torch.save`` would write beside a tensor's values, and whether it would make a parameter of them.

    Returns None if its class pickles the values in its own way, or if they are not plain.
    """
    try:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            return None
        reduced: Any = tensor.__reduce_ex__(2)
    except Exception:  # noqa: BLE001  # the class's own code: then the value is pickled as a whole, which says more
        return None
    match reduced:
        case [made_by, [_, _, _, state]] if made_by is _FROM_STATE:
            return TensorRecipe(None, state), True
        case [made_by, [values, kind, _, state]] if made_by is _FROM_TYPE and values in _FROM_STORAGE:
            return TensorRecipe(None if kind is torch.Tensor else kind, state), False
        case [made_by, [_, _, _]] if made_by is _PARAMETER:  # of a subclass, which torch.save does not keep
            return TensorRecipe(None, None), True
    return None


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor over the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()
