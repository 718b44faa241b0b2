"""The shape of a nested state, as JSON: which containers, which keys, and which item each leaf is.

    node := index of an item (int)
          | ["dict",  [key, ...], [node, ...]]
          | ["odict", [key, ...], [node, ...], metadata or null]     collections.OrderedDict
          | ["list",  [node, ...]]
          | ["chunks", [length, ...], [[[offset, ...], index], ...]]  a tensor that several ranks wrote in chunks (Chunks)
          | null                     another rank writes it; only in one rank's save record, never in a checkpoint

A key is a str, int, finite float, bool or null and keeps its type; no two keys of a container are equal. ``metadata`` is the
``_metadata`` attribute that ``nn.Module.state_dict()`` sets on its result (module versions). Two leaves that are the same
bytes (tied weights) name the same item. Reading a structure runs no code from it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stager.workers.errors import UsageError

Key = str | int | float | bool | None
Path = tuple[Key, ...]
Node = Any  # recursive; see above

ABSENT: Node = None
"""The node of a leaf that another rank writes."""

_MAX_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Chunks:
    """A tensor that is stored in chunks.

    Attributes:
        shape: of the whole tensor, in elements.
        parts: (offsets of the chunk in the whole, index of its item) of each chunk.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], int], ...]

    def to_node(self) -> Node:
        """Return the chunks as a structure node."""
        return ["chunks", list(self.shape), [[list(offsets), index] for offsets, index in self.parts]]

    @staticmethod
    def from_node(node: Node) -> Chunks:
        """Parse a structure node.

        Raises:
            ValueError: ``node`` is not a tensor in chunks.
        """
        try:
            _, shape, parts = node
            chunks = Chunks(tuple(shape), tuple((tuple(offsets), index) for offsets, index in parts))
        except TypeError as error:
            raise ValueError(
                f"the structure of the state has a malformed entry for a tensor in chunks: {str(node)[:60]}"
            ) from error
        numbers = [*chunks.shape, *(n for offsets, index in chunks.parts for n in (*offsets, index))]
        if not chunks.parts or any(type(number) is not int for number in numbers):
            raise ValueError(
                f"the structure of the state has a malformed entry for a tensor in chunks: {str(node)[:60]}"
            )
        return chunks


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Iterate over (key path of a leaf, index of its item); a tensor in chunks comes once per chunk.

    Raises:
        ValueError: ``node`` is not a structure.
    """
    for at, leaf in leaves(node, path):
        if isinstance(leaf, Chunks):
            for _, index in leaf.parts:
                yield at, index
        else:
            yield at, leaf


def leaves(node: Node, path: Path = (), *, text_keys: bool = False) -> Iterator[tuple[Path, int | Chunks]]:
    """Iterate over (key path of a leaf, its item or chunks). Leaves that another rank writes are left out.

    Args:
        text_keys: give the keys of mappings as ``str``, as DCP does.

    Raises:
        ValueError: ``node`` is not a structure.
    """
    if type(node) is int:
        yield path, node
        return
    if node is ABSENT:
        return
    if _is_chunks(node):
        yield path, Chunks.from_node(node)
        return
    keys, children = _open(node, len(path))
    named = map(str, keys) if text_keys and node[0] != "list" else keys
    for key, child in zip(named, children, strict=True):
        if type(child) is int:  # most are: save the generator
            yield (*path, key), child
        else:
            yield from leaves(child, (*path, key), text_keys=text_keys)


def absent(node: Node, path: Path = ()) -> Iterator[Path]:
    """Iterate over the key paths of the leaves that another rank writes.

    Raises:
        ValueError: ``node`` is not a structure.
    """
    if node is ABSENT:
        yield path
    elif type(node) is not int and not _is_chunks(node):
        for key, child in zip(*_open(node, len(path)), strict=True):
            if type(child) is not int:
                yield from absent(child, (*path, key))


def map_leaves(node: Node, leaf: Callable[[int | Chunks], Node]) -> Node:
    """Return a structure of the same containers and keys, with ``leaf(item or chunks)`` in place of each leaf.

    Leaves that another rank writes stay absent. The nodes are not checked: ``node`` has to be a structure.
    """
    if type(node) is int:
        return leaf(node)
    if node is ABSENT:
        return ABSENT
    if node[0] == "chunks":
        return leaf(Chunks.from_node(node))
    position = 1 if node[0] == "list" else 2
    children = [map_leaves(child, leaf) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]


def build(node: Node, leaf: Callable[[int], Any], depth: int = 0) -> Any:
    """Build the nested state, with the value ``leaf(index)`` for each leaf.

    Raises:
        ValueError: ``node`` is not a structure.
        UsageError: a tensor is stored in chunks.
    """
    if type(node) is int:
        return leaf(node)
    if _is_chunks(node):
        raise UsageError("several ranks saved this tensor in chunks; load it with torch's dcp.load")
    keys, children = _open(node, depth)
    values = [build(child, leaf, depth + 1) for child in children]
    if node[0] == "list":
        return values
    if node[0] == "dict":
        return dict(zip(keys, values, strict=True))
    result: OrderedDict[Key, Any] = OrderedDict(zip(keys, values, strict=True))
    if node[3] is not None:
        result._metadata = OrderedDict(node[3])  # type: ignore[attr-defined]  # where nn.Module looks for it
    return result


def _is_chunks(node: Node) -> bool:
    return isinstance(node, list) and node[:1] == ["chunks"]


def _open(node: Node, depth: int) -> tuple[list[Key], list[Node]]:
    """Return the keys and the children of a container node, after checking it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"the state is nested deeper than {_MAX_DEPTH} containers")
    if not isinstance(node, list) or not node:
        raise ValueError(f"the structure of the state has a malformed entry: {str(node)[:60]}")
    kind, *rest = node
    if kind == "list" and len(rest) == 1 and isinstance(rest[0], list):
        return list(range(len(rest[0]))), rest[0]
    if (kind == "dict" and len(rest) == 2) or (kind == "odict" and len(rest) == 3):
        keys, children = rest[0], rest[1]
        if isinstance(keys, list) and isinstance(children, list) and len(keys) == len(children):
            if all(map(_is_key, keys)) and len(set(keys)) == len(keys) and all(map(_is_metadata, rest[2:])):
                return keys, children
    raise ValueError(f"the structure of the state has a malformed entry: {str(node)[:60]}")


def _is_key(key: Any) -> bool:
    return key is None or isinstance(key, (str, int)) or (isinstance(key, float) and math.isfinite(key))


def _is_metadata(metadata: Any) -> bool:
    return metadata is None or (
        isinstance(metadata, dict)
        and all(
            isinstance(entry, dict) and all(isinstance(value, (int, str)) for value in entry.values())
            for entry in metadata.values()
        )
    )


def fqn(path: Path) -> str:
    """Return the name that DCP gives a leaf: its keys joined by dots."""
    return ".".join(map(str, path))


def describe(path: Path) -> str:
    """Return a key path as a user would write it: ``optimizer['state'][3]['exp_avg']``."""
    if not path:
        return "state"
    head, *rest = path
    return f"{head if isinstance(head, str) and head.isidentifier() else f'state[{head!r}]'}" + "".join(
        f"[{key!r}]" for key in rest
    )
