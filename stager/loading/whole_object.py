"""Restoring a container that was stored as one object into one of the target that holds tensors or objects.

Some containers are one object in the checkpoint: in the format ``torch`` every mapping with a class or keys of its own, in
each format one in itself or nested very deep. The object is unpickled before anything is changed, and compared here with the
target; then tensors are copied into the target's, objects get their state, and everything else is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from stager.loading.difference import object_difference
from stager.state.per_rank import PerRank
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Path, describe


def holds_state(value: Any) -> bool:
    """Whether a plain container of the target, which may be in itself, has in it what is to be restored in place."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, (torch.Tensor, PerRank)) or is_stateful(one):
            return True
        if isinstance(one, (Mapping, list)) and id(one) not in seen:
            seen.add(id(one))
            todo += one.values() if isinstance(one, Mapping) else one
    return False


def differences(loaded: Any, target: Any, path: Path) -> Iterator[str]:
    """Iterate over what does not fit: of containers, what the checkpoint lacks; of tensors, shape and dtype."""
    seen: set[int] = set()
    todo = [(loaded, target, path)]
    while todo:
        value, into, at = todo.pop()
        if isinstance(into, torch.Tensor):
            if (problem := object_difference(value, into, at)) is not None:
                yield problem
        elif not is_stateful(into) and holds_state(into) and id(into) not in seen:
            seen.add(id(into))
            entries = _entries(value, into)
            if entries is None:
                yield (
                    f"{describe(at)}: is a {type(into).__name__} in the target and "
                    f"a {type(value).__name__} in the checkpoint"
                )
                continue
            for key, child in entries.items():
                found = _entry(value, key)
                if found is _MISSING:
                    yield f"{describe((*at, key))}: is not in the checkpoint"
                else:
                    todo.append((found, child, (*at, key)))


def restore(loaded: Any, target: Any) -> None:
    """Restore what :func:`differences` found to fit."""
    seen: set[int] = set()
    todo = [(loaded, target)]
    while todo:
        value, into = todo.pop()
        if isinstance(into, torch.Tensor):
            with torch.no_grad():
                into.copy_(value)
        elif is_stateful(into):
            into.load_state_dict(value)
        elif id(into) not in seen:
            seen.add(id(into))
            todo += _replace_values(value, into)


def _replace_values(loaded: Any, container: Any) -> list[tuple[Any, Any]]:
    """Put what holds no state into a container. Returns the rest: (loaded, target)."""
    rest = []
    known = _entries(loaded, container) or {}
    items = loaded.items() if isinstance(loaded, Mapping) else enumerate(loaded)
    for key, value in items:
        if key in known and holds_state(known[key]):
            rest.append((value, known[key]))
        elif key in known or isinstance(container, MutableMapping):
            container[key] = value
        else:
            container.append(value)
    return rest


_MISSING = object()


def _entries(loaded: Any, target: Any) -> dict[Any, Any] | None:
    """The entries of a target's container by key or position; None: the checkpoint has another kind of value."""
    if isinstance(target, Mapping) and isinstance(loaded, Mapping):
        return dict(target)
    if isinstance(target, list) and isinstance(loaded, list):
        return dict(enumerate(target))
    return None


def _entry(container: Any, key: Any) -> Any:
    if isinstance(container, Mapping):
        return container.get(key, _MISSING)
    return container[key] if key < len(container) else _MISSING
