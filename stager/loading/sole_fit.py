"""``into=`` an object itself, not a mapping of names: what of the checkpoint it can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stager.config.arguments import check_into
from stager.loading.nodes import children_of, is_list, is_mapping, kind_of, state_of
from stager.loading.prefixes import find_prefixes
from stager.loading.renaming import Renaming
from stager.state.shards import shape_of
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.checkpoint.layout.tensor_node import without_flags
from stager.workers.errors import StateMismatchError

WHOLE = "state"
"""The name that the whole state gets if it is what the object takes."""

_ROOT: Any = object()


def sole_fit(
    structure: Node, items: Sequence[Item], target: Any, path: str, renaming: Renaming, *, strict: bool
) -> tuple[Node, str]:
    """Find what an object takes. Returns a structure with one name at its top, and that name.

    Args:
        structure: of the checkpoint, or the selected part of it.
        items: of the checkpoint.
        target: what was given as ``into``.
        path: of the checkpoint, for messages.
        renaming: gives the checkpoint's names a prefix that only the target has.
        strict: all names have to match; otherwise, some.

    Raises:
        ArgumentError: the target is no object that takes a state.
        StateMismatchError: nothing fits, or several values do.
    """
    kind = type(target).__name__
    check_into(target)
    state = state_of(target, (kind,))
    nodes = children_of(structure)
    keys = state.keys() if isinstance(state, Mapping) else ()
    candidates = [*nodes.items(), (_ROOT, structure)]
    for is_whole in (True,) if strict else (True, False):
        fitting = [
            name
            for name, node in candidates
            if _fits(without_flags(renaming.aligned(node, keys)), items, target, state, is_whole=is_whole)
        ]
        if fitting == [_ROOT]:
            return ["dict", [WHOLE], [structure]], WHOLE
        fitting = [name for name in fitting if name is not _ROOT]
        if len(fitting) == 1:
            return ["dict", fitting, [nodes[fitting[0]]]], str(fitting[0])
        if fitting:
            break
    if fitting:
        raise StateMismatchError(
            f"{path}: {' and '.join(map(str, fitting))} both fit the {kind} given as into; nothing was changed. Name the "
            f"one that you want: into={{{fitting[0]!r}: ...}}"
        )
    prefixes = [
        one.sentence
        for above, node in [*(((name,), node) for name, node in nodes.items()), ((), structure)]
        for one in find_prefixes([(*above, key) for key in keys], [(*above, key) for key in children_of(node)])
        if len(one.missing) == len(keys) == len(children_of(node))
    ]
    if prefixes:
        raise StateMismatchError(
            f"{path}: nothing in it fits the {kind} given as into: {prefixes[0]}. Nothing was changed"
        )
    there = ", ".join(f"{name} ({kind_of(node)})" for name, node in list(nodes.items())[:8])
    raise StateMismatchError(
        f"{path}: nothing in it fits the {kind} given as into; nothing was changed. It has {there or 'nothing'}. Name the "
        f"one that you want, to see what differs: into={{{next(iter(nodes), 'model')!r}: ...}}"
    )


def _fits(node: Node, items: Sequence[Item], target: Any, state: Any, *, is_whole: bool) -> bool:
    """Tell whether a node has what the state of an object has: a module's names and shapes, an optimizer's groups."""
    if not is_mapping(node) or not isinstance(state, Mapping):
        return False
    nodes = children_of(node)
    if isinstance(target, torch.optim.Optimizer):
        groups: Node = nodes.get("param_groups")
        return "state" in nodes and is_list(groups) and len(groups[1]) == len(target.param_groups)
    both = nodes.keys() & state.keys()
    if not both or (is_whole and not len(both) == len(nodes) == len(state)):
        return False
    return all(_has_shape(nodes[name], items, state[name]) for name in both if isinstance(state[name], torch.Tensor))


def _has_shape(node: Node, items: Sequence[Item], tensor: torch.Tensor) -> bool:
    if torch.nn.parameter.is_lazy(tensor):
        return True
    return type(node) is int and (items[node].kind == "object" or items[node].shape == shape_of(tensor))
