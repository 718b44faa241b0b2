"""The shape of a nested state, as JSON: which containers, which keys, and which item each leaf is.

    node := index of an item (int)
          | ["dict",  [key, ...], [node, ...]]
          | ["odict", [key, ...], [node, ...], metadata or null]     collections.OrderedDict
          | ["list",  [node, ...]]
          | ["mapping",  [RECIPE, name, ...], [item, node, ...]]     any other mapping: its class, its keys (Recipe)
          | ["sequence", [RECIPE, name, ...], [item, node, ...]]     a subclass of list
          | ["wrapper",  [RECIPE, name, ...], [item, node, ...]]     a tensor that is made of other tensors
          | ["chunks", [length, ...], [[[offset, ...], index], ...]]  a tensor that several ranks wrote in chunks (Chunks)
          | ["tensor", node, flags, item?]  a leaf that is more than its values: see :mod:`.tensor_node`
          | null                     another rank writes it; only in one rank's save record, never in a checkpoint

A key is a str, int, finite float, bool or null and keeps its type; no two keys of a container are equal. A mapping with
other keys (tuples, bytes, enums) has a recipe, and ``str(key)`` as names. The item of a recipe is a pickled tuple: what
:func:`.building.build` makes the value from, beside its children. ``metadata`` is the ``_metadata`` attribute that
``nn.Module.state_dict()`` sets on its result (module versions). Two leaves that are the same bytes (tied weights) name the
same item. Reading a structure runs no code from it; ValueError says that it is malformed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stager.workers.checkpoint.layout.tensor_node import TensorNode, is_tensor_node, open_tensor

Key = str | int | float | bool | None
Path = tuple[Key, ...]
Node = Any  # recursive; see above

ABSENT: Node = None
"""The node of a leaf that another rank writes."""

RECIPE = "__recipe__"
"""The first key of a container that has a recipe."""

WITH_RECIPE = ("mapping", "sequence", "wrapper")
"""The kinds of containers that have a recipe."""

_MAX_DEPTH = 200


class Container(NamedTuple):
    """A container node, taken apart.

    Attributes:
        kind: "dict", "odict", "list", or one with a recipe.
        keys: of a list, the positions.
        metadata: of an OrderedDict that a module made; else None.
    """

    kind: str
    keys: Sequence[Key]
    children: Sequence[Node]
    metadata: Any = None


def container_of(node: Node) -> Container:
    """Take a container node apart. The node is not checked; ``open_container`` does that."""
    if node[0] == "list":
        return Container("list", range(len(node[1])), node[1])
    return Container(*node)


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
        """Parse a structure node."""
        try:
            _, shape, parts = node
            chunks = Chunks(tuple(shape), tuple((tuple(offsets), index) for offsets, index in parts))
            numbers = [*chunks.shape, *(n for offsets, index in chunks.parts for n in (*offsets, index))]
        except TypeError as error:
            raise _malformed(node) from error
        if not chunks.parts or any(type(number) is not int for number in numbers):
            raise _malformed(node)
        return chunks


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Iterate over (key path of a leaf, index of its item); a tensor in chunks comes once per chunk."""
    for at, leaf in leaves(node, path):
        if isinstance(leaf, Chunks):
            yield from ((at, index) for _, index in leaf.parts)
        else:
            yield at, leaf


def leaves(node: Node, path: Path = (), *, text_keys: bool = False) -> Iterator[tuple[Path, int | Chunks]]:
    """Iterate over (key path of a leaf, its item or chunks). Leaves that another rank writes are left out.

    Args:
        text_keys: give the keys of mappings as ``str``, as DCP does.
    """
    if type(node) is int:
        yield path, node
    elif is_chunks(node):
        yield path, Chunks.from_node(node)
    elif is_tensor_node(node):
        inner, _, recipes = open_tensor(node)
        yield from ((recipe_path(path), recipe) for recipe in recipes if recipe is not ABSENT)
        yield from leaves(inner, path)
    elif node is not ABSENT:
        kind, keys, children, _ = open_container(node, len(path))
        if text_keys:
            keys = _dcp_keys(kind, keys)
        for key, child in zip(keys, children, strict=True):
            if type(child) is int:  # most are: save the generator
                yield (*path, key), child
            else:
                yield from leaves(child, (*path, key), text_keys=text_keys)


def _dcp_keys(kind: str, keys: Sequence[Key]) -> Sequence[Key]:
    """Return the keys as DCP has them: positions in a list, else text."""
    if kind == "list":
        return keys
    return [keys[0], *range(len(keys) - 1)] if kind == "sequence" else list(map(str, keys))


def absent(node: Node, path: Path = ()) -> Iterator[Path]:
    """Iterate over the key paths of the leaves that another rank writes."""
    if node is ABSENT:
        yield path
    elif is_tensor_node(node):
        inner, _, recipes = open_tensor(node)
        yield from (path if one is inner else recipe_path(path) for one in (*recipes, inner) if one is ABSENT)
    elif type(node) is not int and not is_chunks(node):
        _, keys, children, _ = open_container(node, len(path))
        for key, child in zip(keys, children, strict=True):
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
    if is_chunks(node):
        return leaf(Chunks.from_node(node))
    if is_tensor_node(node):
        inner, flags, recipes = open_tensor(node)
        return TensorNode(map_leaves(inner, leaf), flags, [map_leaves(recipe, leaf) for recipe in recipes]).to_node()
    position = 1 if node[0] == "list" else 2  # of the children; what stands around them stays
    children = [map_leaves(child, leaf) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]


def has_chunks(node: Node) -> bool:
    """Return whether a tensor of the structure is stored in chunks. The nodes are not checked."""
    if not isinstance(node, list):
        return False
    if is_chunks(node):
        return True
    if is_tensor_node(node):
        return has_chunks(node[1])
    children = node[1 if node[0] == "list" else 2]
    return set(map(type, children)) != {int} and any(map(has_chunks, children))


def is_with_recipe(node: Node) -> bool:
    """Tell whether the node is a container that can be built only whole, by its recipe."""
    return isinstance(node, list) and node[0] in WITH_RECIPE


def key_names(keys: Sequence[Any]) -> list[str]:
    """Return the names of a mapping's keys, where they are not keys themselves: ``str(key)``, and a number if needed."""
    names: dict[str, None] = {RECIPE: None}
    for key in keys:
        name, number = str(key), 1
        while name in names:
            number += 1
            name = f"{key}~{number}"
        names[name] = None
    return list(names)[1:]


def is_chunks(node: Node) -> bool:
    return isinstance(node, list) and node[:1] == ["chunks"]


def open_container(node: Node, depth: int) -> Container:
    """Check a container node that may come from a file, and take it apart."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"the state is nested deeper than {_MAX_DEPTH} containers")
    match node:
        case ["list", list()]:
            return container_of(node)
        case ["dict", list(keys), list(children)] | ["odict", list(keys), list(children), _]:
            if len(keys) == len(children) and _are_keys(keys) and len(set(keys)) == len(keys):
                if _is_metadata(*node[3:]):
                    return container_of(node)
        case [("mapping" | "sequence" | "wrapper"), [str(first), *names], [int(), *children]] if first == RECIPE:
            if len(names) == len(children) == len(set(names)) and all(isinstance(name, str) for name in names):
                return container_of(node)
    raise _malformed(node)


def _are_keys(keys: Sequence[Any]) -> bool:
    return set(map(type, keys)) <= _KEY_TYPES or all(map(_is_key, keys))


_KEY_TYPES = {str, int, bool, type(None)}


def _is_key(key: Any) -> bool:
    return key is None or isinstance(key, (str, int)) or (isinstance(key, float) and math.isfinite(key))


def _is_metadata(metadata: Any = None) -> bool:
    return metadata is None or (
        isinstance(metadata, dict)
        and all(isinstance(entry, dict) for entry in metadata.values())
        and all(isinstance(value, (int, str)) for entry in metadata.values() for value in entry.values())
    )


def _malformed(node: Node) -> ValueError:
    return ValueError(f"the structure of the state has a malformed entry: {str(node)[:60]}")


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the names of leaves in the checkpoint: their keys joined by dots, as DCP has them.

    Where two would have the same name (``x[1]`` and ``x['1']``, which DCP refuses), each is called ``describe(path)``.
    """
    names = list(map(fqn, paths))
    if len(set(names)) == len(names):
        return names
    counts = Counter(names)
    unique: dict[str, None] = {name: None for name, count in counts.items() if count == 1}
    for position, path in enumerate(paths):
        if counts[names[position]] > 1:
            name = describe(path)
            while name in unique:
                name += "'"
            unique[name] = None
            names[position] = name
    return names


def recipe_path(path: Path) -> Path:
    """Return the key path of a tensor's recipe: beside the whole state, because a reader may not look into a tensor."""
    return (f"{fqn(path)}.{RECIPE}",)


def is_recipe(path: Path) -> bool:
    """Tell whether the leaf at a key path is the recipe of a container or of a tensor."""
    return isinstance(path[-1], str) and (path[-1] == RECIPE or path[-1].endswith(f".{RECIPE}"))


def fqn(path: Path) -> str:
    """Return the name that DCP gives a leaf: its keys joined by dots."""
    return ".".join(map(str, path))


def describe(path: Path) -> str:
    """Return a key path as a user would write it: ``optimizer['state'][3]['exp_avg']``."""
    if not path:
        return "state"
    head, *rest = path
    if not rest and isinstance(head, str) and head.endswith(f".{RECIPE}"):  # see ``recipe_path``
        return f"{head.removesuffix(f'.{RECIPE}')} (its class and attributes)"
    first = head if isinstance(head, str) and head.isidentifier() else f"state[{_text_of(head)}]"
    return first + "".join(f"[{_text_of(key)}]" for key in rest)


def _text_of(key: Any) -> str:
    try:
        return repr(key)
    except Exception:  # noqa: BLE001  # a key of a class of the user's; the message is about something else
        return f"<{type(key).__name__}>"
