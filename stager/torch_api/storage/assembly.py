"""Assembling one layout from what the ranks wrote: files, items in file order, and the structure that names them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from stager.torch_api.storage.spans import SEGMENT_BYTES, Written
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.layout.structure import Chunks, Key, Node, Path, fqn
from stager.workers.errors import InternalError, UnstageableError, UsageError

_MAX_DEPTH = 100


def assemble(
    metadata: Metadata, written: Iterable[tuple[MetadataIndex, Written]]
) -> tuple[Layout, tuple[tuple[str, ...], ...]]:
    """Return the layout of a checkpoint, and the hashes of the segments of each item.

    Args:
        metadata: the planner's; its ``planner_data`` may give the key path of each name.
        written: what all ranks wrote.

    Raises:
        UsageError: no rank wrote a value that the planner announced.
        UnstageableError: the shards of a tensor cannot be described as chunks; names the tensor.
    """
    entries = sorted(written, key=lambda entry: (entry[1].file, entry[1].item.offset))
    sizes = {one.file: one.end for _, one in entries}  # the last span of a file ends the file
    numbers = {name: number for number, name in enumerate(sizes)}
    items = tuple(replace(one.item, file=numbers[one.file]) for _, one in entries)
    parts: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for number, (index, _) in enumerate(entries):
        parts.setdefault(index.fqn, []).append((tuple(index.offset or ()), number))
    missing = next((name for name in metadata.state_dict_metadata if name not in parts), None)
    if missing is not None:
        raise UsageError(
            f"{missing}: the save planner's metadata has this value, and no rank wrote it; check that "
            "create_local_plan() of one rank returns it"
        )
    layout = Layout(tuple(FileSpec(*entry) for entry in sizes.items()), Items.of(items), None, SEGMENT_BYTES)
    nodes = {name: _node(name, parts[name], metadata, layout) for name in metadata.state_dict_metadata}
    layout = replace(layout, structure=nest(nodes, metadata.planner_data))
    try:
        check_layout(layout)
    except (ValueError, TypeError, IndexError) as error:
        raise InternalError(f"stager assembled an invalid layout of the items that the ranks wrote: {error}") from error
    return layout, tuple(one.hashes for _, one in entries)


def _node(name: str, parts: list[tuple[tuple[int, ...], int]], metadata: Metadata, layout: Layout) -> Node:
    """The structure's node of a name: its item, or its chunks."""
    (offsets, first), described = parts[0], metadata.state_dict_metadata[name]
    if isinstance(described, BytesStorageMetadata) or (len(parts) == 1 and layout.items[first].kind == "object"):
        return first
    size, shapes = tuple(described.size), [layout.items[index].shape for _, index in parts]
    if len(parts) == 1 and size == shapes[0] and not any(offsets):
        return first
    if any(layout.items[index].kind == "object" for _, index in parts):
        raise UnstageableError(
            name, "is sharded, and one of its shards is not a dense tensor; save the full tensor instead"
        )
    if sum(map(math.prod, shapes)) != math.prod(size):
        raise UnstageableError(
            name, f"its shards have shapes {shapes}, which together are not a tensor of shape {size}"
        )
    return Chunks(size, tuple(parts)).to_node()


def nest(nodes: Mapping[str, Node], paths: Any) -> Node:
    """The structure: nested as the planner's key paths say, or flat by name if they are missing or contradict each other."""
    root: _Branch = {}
    for name, node in nodes.items():
        path = paths.get(name) if isinstance(paths, Mapping) else None
        if not _is_path(path, name) or not _insert(root, path, node):
            return ["dict", list(nodes), list(nodes.values())]
    return ["dict", list(root), list(map(_to_node, root.values()))]


_Branch = dict[Key, Any]  # a child is a branch, or the node of a leaf, which is an int or a list


def _is_path(path: Any, name: str) -> TypeGuard[Path]:
    return (
        isinstance(path, tuple)
        and 0 < len(path) <= _MAX_DEPTH
        and all(type(key) in (str, int) for key in path)
        and fqn(path) == name
    )


def _insert(branch: _Branch, path: Path, leaf: Node) -> bool:
    """Insert a leaf. False if another value is at its path or above it, as ranks may have different values under one key."""
    for key in path[:-1]:
        child = branch.setdefault(key, {})
        if not isinstance(child, dict):
            return False
        branch = child
    is_free = path[-1] not in branch
    branch.setdefault(path[-1], leaf)
    return is_free


def _to_node(child: _Branch | Node) -> Node:
    if not isinstance(child, dict):
        return child
    if all(type(key) is int for key in child) and set(child) == set(range(len(child))):
        return ["list", [_to_node(child[index]) for index in range(len(child))]]
    return ["dict", list(child), list(map(_to_node, child.values()))]
