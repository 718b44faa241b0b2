"""Giving the keys of a foreign checkpoint the types and the nesting that those of the target have.

DCP makes text of every key, and has no entry for a container without values. safetensors, and DCP without flattening, have
names only: keys joined by dots. What was lost is taken from the target:

    the checkpoint has     the target has            becomes
    '(1, 2)'               the key (1, 2)            (1, 2)
    '3'                    the key 3                 3; where all keys of the target's mapping are integers, any such name
    'model.0.weight'       'model'                   'model', and in it '0.weight'
    '0', '1', ...          a list                    a list; an element whose number is not there is missing
    no such name           an empty container, or    an empty container
                           an object without state
    no 'state'             an optimizer              an optimizer without state: it never made a step
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from stager.loading.nodes import children_of, in_one_order, is_list, is_mapping, state_of
from stager.loading.prefixes import find_prefixes
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import ABSENT, Key, Node, Path
from stager.workers.errors import UsageError
from stager.workers.wording import first_of

_MAX_DEPTH = 100
_KEY_TYPES = (str, int, float, tuple, type(None))
_SHOWN_NAMES = 3
_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")  # as str() writes it


def fitted(structure: Node, target: Any) -> Node:
    """Return the structure with the keys of ``target``.

    Args:
        structure: its keys are text, or were fitted before.
        target: what is loaded into: a mapping, or one object with ``load_state_dict()``.

    Raises:
        UnloadableError: ``state_dict()`` of an object of the target raised.
    """
    if isinstance(target, Mapping):
        return _mapping(children_of(structure), target, ())
    return _to_object(structure, target) if is_stateful(target) else structure


def refuse_if_itself(structure: Node, target: Any, path: str) -> None:
    """Raise UsageError if the checkpoint has no entry for the only object of ``target``, but is its state dict itself.

    Args:
        path: of the checkpoint, for messages.
    """
    nodes = children_of(structure)
    if not isinstance(target, Mapping) or len(target) != 1:
        return
    ((key, value),) = target.items()
    prefix = f"{key}."
    if not is_stateful(value) or key in nodes:
        return
    state = state_of(value, (key,))
    common = [name for name in state if name in nodes] if isinstance(state, Mapping) else []
    inside = [str(name)[len(prefix) :] for name in nodes if str(name).startswith(prefix)]
    if inside and (not common or any(name in state for name in inside)):  # transformers has names in model itself, too
        return
    if common:
        raise UsageError(
            f"{path} has no {key!r}: it is the state dict of one object itself, with the names {_shown(common)}; "
            f"pass the {type(value).__name__} itself, load_checkpoint(path, into={key})"
        )
    names = [(name,) for name in state] if isinstance(state, Mapping) else []
    if found := find_prefixes(names, [(name,) for name in nodes]):
        raise UsageError(
            f"{path} has no {key!r}: it is the state dict of one object itself, and {found[0].sentence}, with the "
            f"{type(value).__name__} itself as into={key}"
        )


def _to_object(structure: Node, value: Any) -> Node:
    """Fit all that one object could take: the whole, or an entry. Which it is, ``sole_fit`` tells."""
    nodes = children_of(structure)
    state = {"param_groups": None} if isinstance(value, torch.optim.Optimizer) else state_of(value, ("state",))
    names = set(map(str, state)) if isinstance(state, Mapping) else set()
    if any(not names.isdisjoint((str(key), *_heads(str(key)))) for key in nodes):
        return _fit(structure, value, ())
    joined: dict[Key, dict[Key, Node]] = {}
    rest: dict[Key, Node] = {}
    for key, node in nodes.items():
        text = str(key)
        head = next((head for head in _heads(text) if text[len(head) + 1 :] in names), None)
        if head is None:
            rest[key] = node
        else:
            joined.setdefault(head, {})[text[len(head) + 1 :]] = node
    entries = rest | {head: _dict(below) for head, below in joined.items()}
    return _dict({key: _fit(node, value, (key,)) for key, node in entries.items()})


def _heads(text: str) -> list[str]:
    """What stands before each dot of a name."""
    return [text[:position] for position, letter in enumerate(text) if letter == "."]


def _shown(names: Iterable[Any]) -> str:
    return first_of(list(names), _SHOWN_NAMES) or "none"


def _fit(node: Node, value: Any, path: Path) -> Node:
    """Return a node with the keys of ``value``, the target's value at ``path``."""
    if len(path) > _MAX_DEPTH:
        return node
    if isinstance(value, torch.optim.Optimizer):
        return _optimizer(node, value, path)
    if is_stateful(value):
        value = state_of(value, path)
    if isinstance(value, Mapping) and is_mapping(node):
        return _mapping(children_of(node), value, path)
    if isinstance(value, (list, tuple)):
        return _list(node, value, path)
    return node


def _mapping(nodes: Mapping[Key, Node], value: Mapping[Any, Any], path: Path) -> Node:
    names: dict[Any, str] = {key: key for key in value if isinstance(key, str)}
    taken = set(names.values())  # where both '3' and 3 are there, the text is meant
    names |= {key: str(key) for key in value if isinstance(key, _KEY_TYPES) and str(key) not in taken}
    rest: dict[str, Node] = {str(key): node for key, node in nodes.items()}
    ordered = sorted(rest)
    places = {name: place for place, name in enumerate(rest)}
    found: list[tuple[int, Key, Node]] = []
    for key, name in in_one_order(names):
        at = (*path, key)
        if name in rest:
            found.append((places[name], key, _fit(rest.pop(name), value[key], at)))
        elif below := [one for one in _below(ordered, name) if one in rest]:
            inner = _dict({one[len(name) + 1 :]: rest.pop(one) for one in sorted(below, key=places.__getitem__)})
            found.append((min(map(places.__getitem__, below)), key, _fit(inner, value[key], at)))
        elif (empty := _empty(value[key], at)) is not None:
            found.append((len(places), key, empty))
    has_numbers = bool(value) and all(type(key) is int for key in value)
    found += [(places[key], _integer(key) if has_numbers else key, node) for key, node in rest.items()]
    return _dict({key: node for _, key, node in sorted(found, key=lambda one: one[0])})


def _below(ordered: Sequence[str], name: str) -> list[str]:
    """The names that begin with ``name`` and a dot, of names in order."""
    prefix = f"{name}."
    start = end = bisect_left(ordered, prefix)
    while end < len(ordered) and ordered[end].startswith(prefix):
        end += 1
    return list(ordered[start:end])


def _by_first(node: Node) -> dict[Key, Node]:
    """The children of a mapping; those whose names are joined by dots lie under the first of these."""
    children: dict[Key, Node] = {}
    joined: dict[str, dict[Key, Node]] = {}
    for key, child in children_of(node).items():
        first, dot, rest = str(key).partition(".")
        if dot:
            joined.setdefault(first, {})[rest] = child
        else:
            children[key] = child
    return {**{first: _dict(below) for first, below in joined.items()}, **children}


def _by_parameter(node: Node) -> dict[Key, Node]:
    """The states of an optimizer, by their parameters' numbers or names. Names have dots of their own: ``0.weight``."""
    nodes = children_of(node)
    if any(map(is_mapping, nodes.values())):
        return dict(nodes)
    parts = [str(key).split(".") for key in nodes]
    if all(_INTEGER.fullmatch(first) for first, *_ in parts) and any(len(words) == 2 for words in parts):
        return _by_first(node)  # 0.step
    joined: dict[Key, dict[Key, Node]] = {}
    for words, child in zip(parts, nodes.values(), strict=True):
        joined.setdefault(".".join(words[:-1]), {})[words[-1]] = child  # layer.weight.step
    return {name: _dict(below) for name, below in joined.items()}


def _list(node: Node, value: list[Any] | tuple[Any, ...], path: Path) -> Node:
    if is_mapping(node):
        children = {_integer(key): child for key, child in _by_first(node).items()}
        numbers = [key for key in children if isinstance(key, int) and key >= 0]
        length = max(numbers, default=-1) + 1
        if len(numbers) != len(children):
            return node
        if length != len(children) and not (isinstance(value, list) and length <= len(value)):
            return node
        nodes = [children.get(index, ABSENT) for index in range(length)]
    elif is_list(node):
        nodes = list(node[1])
    else:
        return node
    return ["list", [_fit(one, value[i], (*path, i)) if i < len(value) else one for i, one in enumerate(nodes)]]


def _optimizer(node: Node, optimizer: torch.optim.Optimizer, path: Path) -> Node:
    """An optimizer has a state for each parameter, by number or name, that made a step; and ``param_groups`` always."""
    children = _by_first(node)
    if "param_groups" not in children:
        return node
    state = {_integer(key): child for key, child in _by_parameter(children.get("state", _dict({}))).items()}
    groups = _list(children["param_groups"], optimizer.param_groups, (*path, "param_groups"))
    return _dict({**children, "state": _dict(state), "param_groups": groups})


def _empty(value: Any, path: Path) -> Node | None:
    """The node of a value without a leaf, which has no entry in the checkpoint; None if the value has leaves."""
    if len(path) > _MAX_DEPTH:
        return None
    if is_stateful(value):
        value = state_of(value, path)
    if not isinstance(value, Mapping) or not all(isinstance(key, _KEY_TYPES) for key in value):
        return None
    children = {key: _empty(child, (*path, key)) for key, child in value.items()}
    return None if None in children.values() else _dict(children)


def _integer(key: Key) -> Key:
    return int(key) if isinstance(key, str) and _INTEGER.fullmatch(key) else key


def _dict(children: Mapping[Key, Node]) -> Node:
    return ["dict", list(children), list(children.values())]
