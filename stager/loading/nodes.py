"""Nodes of a checkpoint's structure, and nested values, as matching looks at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stager.workers.checkpoint.layout.structure import Key, Node, Path


def is_mapping(node: Node) -> bool:
    """Whether the node is a dict or OrderedDict."""
    return isinstance(node, list) and node[0] in ("dict", "odict")


def is_list(node: Node) -> bool:
    """Whether the node is a list."""
    return isinstance(node, list) and node[0] == "list"


def children_of(node: Node) -> dict[Key, Node]:
    """The nodes of a mapping by key; of anything else, an empty dict."""
    return dict(zip(node[1], node[2], strict=True)) if is_mapping(node) else {}


def kind_of(node: Node) -> str:
    """What the node is, for messages."""
    if type(node) is int:
        return "a single value"
    return "a list" if node[0] == "list" else "a mapping"


def tensors_of(value: Any, path: Path = ()) -> dict[Path, torch.Tensor]:
    """The tensors in nested mappings and lists, by key path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    found: dict[Path, torch.Tensor] = {}
    if isinstance(value, Mapping):
        for key, child in value.items():
            found |= tensors_of(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found |= tensors_of(child, (*path, index))
    return found
