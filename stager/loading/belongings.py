"""What of a target belongs to somebody, and what is data.

belongs to somebody      an object with ``load_state_dict()``, a ``PerRank``, a parameter, a sharded tensor,
                         the state dict of a module. The checkpoint restores it, and never removes it
data                     everything else: it becomes what the checkpoint has
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from stager.loading.nodes import readable_items
from stager.state.per_rank import PerRank
from stager.state.shards import is_sharded
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Node, Path


def holds_state(value: Any) -> bool:
    """Tell whether a value of the target has in it what is restored in place: a tensor, or what belongs to somebody."""
    return _holds(value, lambda one: isinstance(one, torch.Tensor) or belongs_to_somebody(one))


def holds_belongings(value: Any) -> bool:
    """Tell whether a value of the target has in it what belongs to somebody."""
    return _holds(value, belongs_to_somebody)


def _holds(value: Any, is_found: Callable[[Any], bool]) -> bool:
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if is_found(one):
            return True
        if isinstance(one, (Mapping, list, tuple)) and id(one) not in seen:
            seen.add(id(one))
            todo += [value for _, value in readable_items(one)] if isinstance(one, Mapping) else one
    return False


def belongs_to_somebody(value: Any) -> bool:
    """Tell whether a value itself, not what is in it, belongs to somebody."""
    if isinstance(value, torch.Tensor):
        return is_owned_tensor(value)
    return type(value) is PerRank or is_stateful(value) or _is_marked(value)


def is_owned_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is part of a module, whatever container it is in."""
    return isinstance(tensor, torch.nn.Parameter) or is_sharded(tensor)


def is_module_state(node: Node, value: Mapping[Any, Any]) -> bool:
    """Tell whether a mapping is the state dict of a module, here or in the checkpoint: ``_metadata`` marks it."""
    return _is_marked(value) or is_module_node(node)


def _is_marked(value: Any) -> bool:
    return isinstance(value, OrderedDict) and isinstance(getattr(value, "_metadata", None), Mapping)


def is_module_node(node: Node) -> bool:
    """Tell whether the checkpoint has the state dict of a module at a node."""
    return isinstance(node, list) and node[0] == "odict" and node[3] is not None


def looks_like_module_state(value: Mapping[Any, Any]) -> bool:
    """Tell whether a plain mapping has what a module's state dict has: only tensors, and names with dots in them."""
    has_dots = any(isinstance(key, str) and "." in key for key in value)
    return has_dots and all(isinstance(one, torch.Tensor) for _, one in readable_items(value))


def tensor_paths(value: Any, path: Path) -> Iterator[Path]:
    """Iterate over the key paths of the tensors in a value."""
    seen: set[int] = set()
    todo = [(value, path)]
    while todo:
        one, at = todo.pop()
        if isinstance(one, torch.Tensor):
            yield at
        elif isinstance(one, (Mapping, list, tuple)) and id(one) not in seen:
            seen.add(id(one))
            children = readable_items(one) if isinstance(one, Mapping) else list(enumerate(one))
            todo += [(child, (*at, key)) for key, child in reversed(children)]
