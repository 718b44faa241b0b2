"""The memo given to objects that define their own ``__deepcopy__``.

NOTE [ Objects that copy themselves ]
``__deepcopy__(memo)`` is the object's own code: it will call ``copy.deepcopy(child, memo)`` for its parts, and that is
the standard library's walk, which copies a tensor on the tensor's own device and into ordinary memory. But that walk
asks the memo first, ``memo.get(id(child))``. So before the call every tensor the object can reach is *found* (found,
not copied: the object may not want all of them), and the memo stages a found tensor at the moment it is asked for.
Afterwards, tensors in the result that are neither ours nor the source's were made by the object itself, with
``clone()`` for instance; they are moved into staged memory in place.
An object that returns itself has declared itself shared, and is shared, as with ``copy.deepcopy``.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

# What copy.deepcopy shares instead of copying: nothing behind these is ours to look at.
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.GeneratorType,
    types.CoroutineType,
    property,
    weakref.ref,
    str,
    bytes,
)
Leaf = torch.Tensor | torch.UntypedStorage


class _Stager(Protocol):
    def _offload_leaf(self, leaf: Leaf, memo: dict[int, Any], non_blocking: bool) -> Leaf: ...


class HookMemo(dict[int, Any]):
    """A ``copy.deepcopy`` memo that stages tensors when it is asked for them. One pass, one thread."""

    def __init__(self, entries: Iterable[tuple[int, Any]] = ()) -> None:
        super().__init__(entries)
        self.found: dict[int, Leaf] = {}
        self._walked: dict[int, object] = {}  # kept alive: a recycled id would hide what has not been walked
        self._stager: _Stager | None = None
        self._non_blocking = False

    def find(self, root: object) -> int:
        """Look for tensors behind ``root``; how many were not known before."""
        known = len(self.found)
        for leaf in reachable_leaves(root, self._walked):
            self.found[id(leaf)] = leaf
        return len(self.found) - known

    def arm(self, stager: _Stager, non_blocking: bool) -> _Stager | None:
        """From now on stage found tensors on request; returns what to give :meth:`disarm`."""
        previous, self._stager = self._stager, stager
        self._non_blocking = non_blocking
        return previous

    def disarm(self, previous: _Stager | None) -> None:
        self._stager = previous

    def strangers(self, result: object) -> Iterator[Leaf]:
        """Tensors behind ``result`` that are neither staged ones nor the source's."""
        staged = {id(value) for value in self.values() if isinstance(value, Leaf)}
        for leaf in reachable_leaves(result, dict(self._walked)):
            if id(leaf) not in staged and id(leaf) not in self.found:
                yield leaf

    def get(self, key: int, default: Any = None) -> Any:
        """Return the copy of the object with id ``key``. A leaf that has none is offloaded now."""
        if dict.__contains__(self, key):
            return dict.__getitem__(self, key)
        leaf = self.found.get(key)
        if leaf is None or self._stager is None:
            return default
        return self._stager._offload_leaf(leaf, self, self._non_blocking)

    def __missing__(self, key: int) -> Any:
        leaf = self.found.get(key)
        if leaf is None or self._stager is None:
            raise KeyError(key)
        return self._stager._offload_leaf(leaf, self, self._non_blocking)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (self._stager is not None and key in self.found)


def reachable_leaves(root: object, walked: dict[int, object]) -> Iterator[Leaf]:
    """Tensors and storages behind ``root``, each once, not looking behind what is already in ``walked``."""
    pending = [root]
    while pending:
        current = pending.pop()
        if id(current) in walked or isinstance(current, _OPAQUE):
            continue
        walked[id(current)] = current
        if isinstance(current, Leaf):
            yield current
        elif gc.is_tracked(current):
            pending.extend(gc.get_referents(current))
        else:
            pending.extend(_array_elements(current))


def _array_elements(value: object) -> list[Any]:
    """Elements of a numpy array of objects, which the garbage collector does not know about."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.hasobject:
        return list(value.flat)
    return []
