"""Building a nested state from its structure and the values of its items.

What is built is what was saved: containers with their classes and keys, tensors with their classes, attributes and flags.
Leaves that name one item are tied: each is a tensor object of its own, over one memory, unless one object was saved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from stager.workers.checkpoint.layout.layout import is_dense
from stager.workers.checkpoint.layout.structure import (
    WITH_RECIPE,
    Key,
    Node,
    Path,
    describe,
    is_chunks,
    open_container,
)
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node, open_tensor
from stager.workers.errors import UnloadableError, UsageError


def build(node: Node, leaf: Callable[[int], Any], path: Path = ()) -> Any:
    """Build the nested state, with the value ``leaf(index)`` for each leaf.

    Args:
        path: of the node in the checkpoint, for messages.

    Raises:
        UsageError: a tensor is stored in chunks.
        UnloadableError: a class of the state cannot make the value; names its key path.
    """
    return _Builder(leaf).build(node, path)


def distinct(leaf: Callable[[int], Any]) -> Callable[[int], Any]:
    """Return ``leaf`` so that it returns no tensor object twice: tied tensors share their memory, and nothing else.

    What is done to the one (``requires_grad_()``, an attribute) is not done to the others.
    """
    import torch  # late: workers import this package, and do without torch

    given: set[int] = set()

    def next_of(index: int) -> Any:
        value = leaf(index)
        if index in given and type(value) in (torch.Tensor, torch.nn.Parameter):
            return value.detach()
        given.add(index)
        return value

    return next_of


class _Builder:
    def __init__(self, leaf: Callable[[int], Any]) -> None:
        self._leaf = leaf
        self._objects: dict[tuple[int, int], Any] = {}  # by item and number: see "object" in ``tensor_node``
        self._strided: dict[int, Any] = {}  # by item: its values, in memory of another order

    def build(self, node: Node, path: Path) -> Any:
        if type(node) is int:
            return self._leaf(node)
        if is_tensor_node(node):
            return self._tensor(node, path)
        if is_chunks(node):
            raise UsageError("several ranks saved this tensor in chunks; load it with torch's dcp.load")
        kind, keys, children, metadata = open_container(node, len(path))
        values = [
            self._leaf(child) if type(child) is int else self.build(child, (*path, key))
            for key, child in zip(keys, children, strict=True)
        ]
        if kind == "list":
            return values
        if kind in WITH_RECIPE:
            return _made(_MAKERS[kind], values[0], list(keys[1:]), values[1:], path)
        result = (dict if kind == "dict" else OrderedDict)(zip(keys, values, strict=True))
        if metadata is not None:
            result._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # where nn.Module looks for it
        return result

    def _tensor(self, node: Node, path: Path) -> Any:
        inner, flags, recipes = open_tensor(node)
        key = (inner, flags["object"]) if "object" in flags and type(inner) is int else None
        if key is not None and key in self._objects:
            return self._objects[key]
        tensor = self.build(inner, path)
        if "stride" in flags:
            if inner not in self._strided:
                self._strided[inner] = _made(_in_order, tensor, flags["stride"], path)
                tensor = self._strided[inner]
            else:
                tensor = self._strided[inner].detach()
        recipe = self._leaf(recipes[0]) if recipes else (None, None)
        tensor = _made(_make_tensor, tensor, flags, recipe, path)
        if key is not None:
            self._objects[key] = tensor
        return tensor


def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``make`` with all arguments but the last, which is the key path for the error.

    Raises:
        UnloadableError: ``make`` raised something. The state's own classes may raise anything.
    """
    try:
        return make(*arguments[:-1])
    except Exception as error:
        raise UnloadableError(
            describe(arguments[-1]),
            f"its parts are intact, but cannot be put together here ({type(error).__name__}: {error}); no older "
            "checkpoint was tried. Make its class as it was when it was saved, or load the other values with "
            "load(keys=...)",
        ) from error


def _in_order(tensor: Any, stride: list[int]) -> Any:
    """Copy a tensor's values into memory of another order.

    Raises:
        ValueError: no memory has this stride.
    """
    import torch  # late: as above

    if len(stride) != tensor.dim() or not is_dense(tuple(tensor.shape), tuple(stride)):
        raise ValueError(
            f"the structure gives a tensor of shape {list(tensor.shape)} the stride {stride}, which does not fit: elements "
            "would share memory, or leave gaps"
        )
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _make_tensor(tensor: Any, flags: dict[str, Any], recipe: Any) -> Any:
    """Make of a tensor's values what it was. See ``tensor_node`` for flags and recipe. Does as ``torch.load`` does."""
    import torch  # late: as above

    kind, state = recipe
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the entry of a tensor is a {type(tensor).__name__}")
    if kind is not None:
        tensor = tensor.as_subclass(kind)
    requires_grad = flags.get("requires_grad", False)
    if flags.get("parameter", False) and not isinstance(tensor, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad)
    elif tensor.requires_grad != requires_grad:
        tensor = tensor.requires_grad_(requires_grad)
    if kind is not None and getattr(kind, "__setstate__", torch.Tensor.__setstate__) is not torch.Tensor.__setstate__:
        tensor.__setstate__(state)
        return tensor
    return torch._utils._set_obj_state(tensor, state)  # type: ignore[no-untyped-call]  # torch's stubs lack it


def _make_mapping(recipe: Any, names: list[Key], values: list[Any]) -> Any:
    """``recipe``: the mapping without its items, and its keys; both may be None: a dict, the names."""
    mapping, keys = recipe
    mapping = {} if mapping is None else mapping
    for key, value in zip(names if keys is None else keys, values, strict=True):
        mapping[key] = value
    return mapping


def _make_sequence(recipe: Any, names: list[Key], values: list[Any]) -> Any:
    """``recipe``: a tuple of one list without elements, which is filled and returned. ``names`` are not needed."""
    (sequence,) = recipe
    sequence.extend(values)
    return sequence


def _make_wrapper(recipe: Any, names: list[Key], values: list[Any]) -> Any:
    """``recipe``: class, context, shape and stride, as ``__tensor_flatten__`` and the tensor have them; requires_grad."""
    kind, context, shape, stride, requires_grad = recipe
    tensor = kind.__tensor_unflatten__(dict(zip(names, values, strict=True)), context, shape, stride)
    return tensor.requires_grad_() if requires_grad and not tensor.requires_grad else tensor


_MAKERS = {"mapping": _make_mapping, "sequence": _make_sequence, "wrapper": _make_wrapper}
