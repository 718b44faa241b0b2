"""What a container of a state is: whether a list is one at all, and what is left of a container without its items.

``flatten.py`` visits containers. The rules here are those of ``torch.distributed.checkpoint`` and of pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stager.state.per_rank import PerRank
from stager.state.stateful import is_stateful

MAX_DEPTH = 100
"""A container deeper than so many levels is a leaf."""


def without_items(value: Any, position: int) -> Any:
    """Make what pickle makes of a container before it puts the items in; None if its class does not do it that way.

    Args:
        position: of the items in what ``__reduce_ex__`` returns: 3 for a list, 4 for a mapping.
    """
    try:
        reduced = value.__reduce_ex__(2)
        if not isinstance(reduced, tuple) or len(reduced) <= position or reduced[position] is None:
            return None
        make, arguments, state = reduced[:3]
        empty = make(*arguments)
        if len(empty):  # its constructor puts some in already
            return None
        if state is not None:
            if hasattr(empty, "__setstate__"):
                empty.__setstate__(state)
            else:
                plain, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                vars(empty).update(plain or {})
                for name, slot in (slots or {}).items():
                    setattr(empty, name, slot)
    except Exception:  # noqa: BLE001  # the class's own code: then the value is pickled as a whole, which says more
        return None
    return empty


def is_plain_key(key: Any) -> bool:
    """Tell whether JSON can hold a key."""
    return type(key) in (str, int, bool) or key is None or (type(key) is float and math.isfinite(key))


def is_terminal(values: list[Any], depth: int, seen: set[int] | None = None) -> bool:
    """Tell whether DCP takes a list as a leaf: no tensor, mapping or such a list is in it.

    Args:
        seen: identities of lists that were looked at; lists may share lists, and hold themselves.
    """
    seen = set() if seen is None else seen
    if depth > MAX_DEPTH or id(values) in seen:
        return True
    seen.add(id(values))
    kinds = set(map(type, values))  # a list may have a million entries, of few types
    if kinds <= _SCALARS:
        return True
    if any(issubclass(kind, (Mapping, torch.Tensor, PerRank)) for kind in kinds):
        return False
    if any(map(is_stateful, values)):
        return False
    return not any(isinstance(entry, list) and not is_terminal(entry, depth + 1, seen) for entry in values)


_SCALARS = {type(None), bool, int, float, complex, str, bytes}


def plain_metadata(value: Any) -> dict[str, dict[str, int]] | None:
    """Keep only the version numbers that ``nn.Module.state_dict`` adds to its result as ``_metadata``."""
    metadata = getattr(value, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return None
    return {
        str(name): {k: v for k, v in entry.items() if isinstance(k, str) and type(v) in (int, str, bool)}
        for name, entry in metadata.items()
        if isinstance(entry, Mapping)
    }
