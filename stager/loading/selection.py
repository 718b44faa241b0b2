"""Selecting a part of a checkpoint by the names of its keys."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stager.loading.nodes import state_of
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Node, Path, fqn, is_with_recipe, walk
from stager.workers.errors import StateMismatchError


class Selection:
    """Selects the leaves whose name matches a pattern. The name of a leaf is its keys, joined by dots.

    A list is selected whole if a leaf in it is: without the others, its elements would have other positions.

    Args:
        keys: patterns as in a shell (``model.*.weight``); ``*`` matches dots too.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        self._patterns = [keys] if isinstance(keys, str) else list(keys)
        self._matches = re.compile("|".join(map(fnmatch.translate, self._patterns)) or r"(?!)").match

    def takes(self, path: Path) -> bool:
        """Whether the leaf at ``path`` is selected."""
        return self._matches(fqn(path)) is not None

    def of(self, structure: Node, path: str) -> Node:
        """Return the selected part of a checkpoint's structure.

        Raises:
            StateMismatchError: nothing in the checkpoint at ``path`` is selected.
        """
        selected = self._visit(structure, ())
        if selected is None:
            raise StateMismatchError(f"{path}: no key matches {', '.join(self._patterns)}; nothing was changed")
        return selected

    def _visit(self, node: Node, path: Path) -> Node | None:
        if type(node) is int or node[0] in ("chunks", "tensor"):
            return node if self.takes(path) else None
        if node[0] == "list" or is_with_recipe(node):
            return node if any(self.takes(leaf) for leaf, _ in walk(node, path)) else None
        kept = [
            (key, child)
            for key, value in zip(node[1], node[2], strict=True)
            if (child := self._visit(value, (*path, key))) is not None
        ]
        return [node[0], [key for key, _ in kept], [child for _, child in kept], *node[3:]] if kept else None

    def in_value(self, value: Any, path: Path) -> Iterator[Path]:
        """Yield the paths of the selected leaves of ``value``, a value of the target."""
        if is_stateful(value):
            value = state_of(value, path)
        if isinstance(value, Mapping):
            for key, child in value.items():
                yield from self.in_value(child, (*path, key))
        elif isinstance(value, list):
            for index, child in enumerate(value):
                yield from self.in_value(child, (*path, index))
        elif self.takes(path):
            yield path
