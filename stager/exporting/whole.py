"""Containers with recipes, for a file whose readers know no recipes: each becomes one pickled object.

The outermost ones are taken. A plain dict that has a recipe only for its keys stays a dict, so its tensors stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stager.exporting.source import Source
from stager.workers.checkpoint.layout.structure import Node, Path, container_of, describe, is_with_recipe, walk
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node, open_tensor

Unpickle = Callable[[int], Any]
"""From the number of an object to its value."""


class Folded:
    """A checkpoint's structure in which each container with a recipe is one leaf.

    Args:
        source: the checkpoint.
        unpickle: makes the recipes' values.

    Attributes:
        structure: its leaves are numbers of items, or of containers.
        tensors, objects: its leaves, each once, in the order of the structure. Containers are objects.
        nodes: the containers, by number: (node, key path).
    """

    def __init__(self, source: Source, unpickle: Unpickle) -> None:
        self._source = source
        self._unpickle = unpickle
        self.nodes: dict[int, tuple[Node, Path]] = {}
        self.structure = self._fold(source.structure, ())
        leaves = list(dict.fromkeys(number for _, number in walk_any(self.structure)))
        self.tensors = [n for n in leaves if n not in self.nodes and source.items[n].kind == "tensor"]
        self.objects = [n for n in leaves if n in self.nodes or source.items[n].kind == "object"]

    def name(self, number: int) -> str:
        """A leaf's key path, as a user would write it."""
        return describe(self.nodes[number][1]) if number in self.nodes else self._source.name(number)

    def nbytes(self, number: int) -> int:
        """Memory that a leaf needs, from its bytes in the checkpoint to those in the file."""
        items = self._source.items
        if number not in self.nodes:
            return 4 * items[number].nbytes  # its blob, its value, its new blob, and that in data.pkl
        parts = {index for _, index in walk(self.nodes[number][0])}
        return sum((2 if items[index].kind == "tensor" else 4) * items[index].nbytes for index in parts)

    def _fold(self, node: Node, path: Path) -> Node:
        if type(node) is int:
            return node
        if is_tensor_node(node):
            return self._folded(node, path) if open_tensor(node).recipes else node
        kind, keys, children, metadata = container_of(node)
        if is_with_recipe(node):
            own = self._keys_of(node)
            if own is None:
                return self._folded(node, path)
            folded = [self._fold(child, (*path, key)) for key, child in zip(keys[1:], children[1:], strict=True)]
            return ["dict", own, folded]
        folded = [self._fold(child, (*path, key)) for key, child in zip(keys, children, strict=True)]
        if kind == "list":
            return ["list", folded]
        return [kind, keys, folded, *([metadata] if kind == "odict" else [])]

    def _folded(self, node: Node, path: Path) -> int:
        number = len(self._source.items) + len(self.nodes)
        self.nodes[number] = (node, path)
        return number

    def _keys_of(self, node: Node) -> list[Any] | None:
        """The keys of a plain dict, if the node is one."""
        if node[0] != "mapping":
            return None
        recipe = self._unpickle(node[2][0])
        if not isinstance(recipe, tuple) or len(recipe) != 2 or recipe[0] is not None:
            return None
        keys = node[1][1:] if recipe[1] is None else recipe[1]
        return list(keys) if isinstance(keys, list) and len(keys) == len(node[1]) - 1 else None


def walk_any(node: Node) -> list[tuple[Path, int]]:
    """List (key path of a leaf, its number) of a structure whose keys may be of any class."""
    found: list[tuple[Path, int]] = []
    todo: list[tuple[Path, Node]] = [((), node)]
    while todo:
        path, one = todo.pop()
        if is_tensor_node(one):
            one = open_tensor(one).node
        if type(one) is int:
            found.append((path, one))
        else:
            _, keys, children, _ = container_of(one)
            todo += reversed([((*path, key), child) for key, child in zip(keys, children, strict=True)])
    return found
