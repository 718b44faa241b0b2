"""The memo given to objects that define their own ``__deepcopy__``.

NOTE [ Objects that copy themselves ]
``__deepcopy__(memo)`` is the object's own code. It calls ``copy.deepcopy(child, memo)`` for its parts, and the standard
library then copies a tensor on the tensor's own device, into ordinary memory. But it asks the memo first:
``memo.get(id(child))``. So:
  1. Before the call, every tensor that the object can reach is listed in the memo (not copied: the object may not want all).
  2. During the call, the memo stages a listed tensor when it is asked for it.
  3. After the call, tensors in the result that are neither staged nor the source's were made by the object itself, with
     ``clone()`` for instance. They are moved into staged memory in place.
An object that returns itself has declared itself shared, and is shared, as with ``copy.deepcopy``.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

# copy.deepcopy shares these instead of copying them, so the walk stops at them.
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
    def _copy(self, x: Any, memo: dict[int, Any], non_blocking: bool) -> Any: ...


class HookMemo(dict[int, Any]):
    """A ``copy.deepcopy`` memo that stages tensors when it is asked for them. One pass, one thread."""

    def __init__(self, entries: Iterable[tuple[int, Any]] = ()) -> None:
        super().__init__(entries)
        self._reachable: dict[int, Leaf] = {}  # by id; what it may be asked for
        self._walked: dict[int, object] = {}  # kept alive: a reused id would hide an object that was not walked yet
        self._stager: _Stager | None = None  # while an object copies itself
        self._non_blocking = False

    def find(self, root: object) -> int:
        """List the tensors behind ``root``; return how many are new."""
        known = len(self._reachable)
        self._reachable.update((id(leaf), leaf) for leaf in reachable_leaves(root, self._walked))
        return len(self._reachable) - known

    @contextmanager
    def staging(self, stager: _Stager, non_blocking: bool) -> Iterator[None]:
        """Stage listed tensors on request. Nests: an object that copies itself may hold another one."""
        previous, self._stager, self._non_blocking = self._stager, stager, non_blocking
        try:
            yield
        finally:
            self._stager = previous

    def strangers(self, result: object) -> Iterator[Leaf]:
        """Yield the tensors behind ``result`` that are neither staged nor the source's."""
        staged = {id(value) for value in self.values() if isinstance(value, Leaf)}
        for leaf in reachable_leaves(result, dict(self._walked)):
            if id(leaf) not in staged and id(leaf) not in self._reachable:
                yield leaf

    def get(self, key: int, default: Any = None) -> Any:
        """Return the copy of the object with id ``key``. A listed tensor that has none is staged now."""
        return self[key] if key in self else default  # noqa: SIM401  (it is this method that would be called)

    def __missing__(self, key: int) -> Any:
        if self._stager is None:
            raise KeyError(key)
        return self._stager._copy(self._reachable[key], self, self._non_blocking)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (self._stager is not None and key in self._reachable)


def reachable_leaves(root: object, walked: dict[int, object]) -> Iterator[Leaf]:
    """Yield the tensors and storages behind ``root``, each once. What is in ``walked`` is passed over; it grows."""
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
    """Return the elements of a numpy array of objects: the garbage collector does not look into it. [] for other values."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.hasobject:
        return list(value.flat)
    return []
