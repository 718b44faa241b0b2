"""Nodes of a checkpoint's structure, and nested values, as matching looks at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from stager.state.shards import state_dict_of
from stager.workers.checkpoint.layout.structure import Key, Node, Path, describe, key_names
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node
from stager.workers.errors import UnloadableError


def is_mapping(node: Node) -> bool:
    """Whether the node is a mapping of any class."""
    return isinstance(node, list) and node[0] in ("dict", "odict", "mapping")


def is_plain_mapping(node: Node) -> bool:
    """Whether the node is a mapping without a recipe, so that its keys can be changed."""
    return is_mapping(node) and node[0] != "mapping"


def names_and_children(node: Node, keys: Iterable[Any]) -> tuple[dict[Any, Any], dict[Any, Node]]:
    """Bring the keys of a target together with the nodes of a mapping in the checkpoint.

    Returns:
        The name of each of the ``keys``; the nodes by name. Where the mapping has a recipe, names are text.
    """
    keys = list(keys)
    if node[0] != "mapping":
        return dict(zip(keys, keys, strict=True)), children_of(node)
    return dict(zip(keys, key_names(keys), strict=True)), dict(zip(node[1][1:], node[2][1:], strict=True))


def in_one_order(names: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Order the entries of a target, (key, its name in the checkpoint), for the calls of ``load_state_dict()``.

    Among several ranks by name, as ``dcp.load`` does: a ``load_state_dict()`` or ``state_dict()`` that runs a collective (of
    FSDP) would wait for ever for ranks that are at another entry, because their mapping has another order.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return sorted(names.items(), key=lambda entry: (str(entry[1]), type(entry[1]).__name__))
    return list(names.items())


def readable_items(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Return the items of a mapping of the target. Values that raise when they are read, as a config's may, are left out."""
    try:
        return list(mapping.items())
    except Exception:  # noqa: BLE001  # the class's own code
        items = []
        for key in mapping:
            with suppress(Exception):
                items.append((key, mapping[key]))
        return items


def is_list(node: Node) -> bool:
    """Whether the node is a list."""
    return isinstance(node, list) and node[0] == "list"


def children_of(node: Node) -> dict[Key, Node]:
    """The nodes of a mapping by key; of anything else, an empty dict."""
    if not is_mapping(node):
        return {}
    first = 1 if node[0] == "mapping" else 0  # its recipe is no value of it
    return dict(zip(node[1][first:], node[2][first:], strict=True))


def state_of(value: Any, path: Path) -> Any:
    """Ask an object of the target for its ``state_dict()``.

    Raises:
        UnloadableError: it raised.
    """
    try:
        return state_dict_of(value) if isinstance(value, torch.nn.Module) else value.state_dict()
    except Exception as error:
        raise UnloadableError(
            describe(path),
            f"{type(value).__name__}.state_dict() of the target (what was given as into) raised "
            f"{type(error).__name__}: {error}; nothing was changed",
        ) from error


def kind_of(node: Node) -> str:
    """What the node is, for messages."""
    if type(node) is int or is_tensor_node(node):
        return "a single value"
    return {"list": "a list", "sequence": "a list", "wrapper": "a tensor made of others"}.get(node[0], "a mapping")


def tensors_of(value: Any, path: Path = (), above: frozenset[int] = frozenset()) -> dict[Path, torch.Tensor]:
    """The tensors in nested mappings and lists, by key path.

    Args:
        above: identities of the containers that this one is in; what holds itself is not walked again.
    """
    if isinstance(value, torch.Tensor):
        return {path: value}
    found: dict[Path, torch.Tensor] = {}
    if id(value) in above:
        return found
    above |= {id(value)}
    if isinstance(value, Mapping):
        for key, child in value.items():
            found |= tensors_of(child, (*path, key), above)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found |= tensors_of(child, (*path, index), above)
    return found
