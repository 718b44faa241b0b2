"""Part of a checkpoint, by the names of its keys."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stager.state.flatten import is_stateful
from stager.workers.checkpoint.layout.structure import Node, Path, fqn, walk
from stager.workers.errors import StateMismatchError


class Selection:
    """Leaves whose name, their keys joined by dots, matches one of the patterns.

    A list is taken whole if anything in it is: its places would be others without the rest.

    Args:
        keys: patterns as of a shell (``model.*.weight``); ``*`` takes dots as well.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        self._patterns = [keys] if isinstance(keys, str) else list(keys)
        self._matches = re.compile("|".join(map(fnmatch.translate, self._patterns)) or r"(?!)").match

    def takes(self, path: Path) -> bool:
        """Whether it takes a leaf."""
        return self._matches(fqn(path)) is not None

    def of(self, structure: Node, path: str) -> Node:
        """The structure of what it takes.

        Raises:
            StateMismatchError: it takes nothing of the checkpoint at ``path``.
        """
        selected = self._visit(structure, ())
        if selected is None:
            raise StateMismatchError(f"{path}: no key matches {', '.join(self._patterns)}; nothing was changed")
        return selected

    def _visit(self, node: Node, path: Path) -> Node | None:
        if type(node) is int or node[0] == "chunks":
            return node if self.takes(path) else None
        if node[0] == "list":
            return node if any(self.takes(leaf) for leaf, _ in walk(node, path)) else None
        kept = [
            (key, child)
            for key, value in zip(node[1], node[2], strict=True)
            if (child := self._visit(value, (*path, key))) is not None
        ]
        return [node[0], [key for key, _ in kept], [child for _, child in kept], *node[3:]] if kept else None

    def in_value(self, value: Any, path: Path) -> Iterator[Path]:
        """Of a value that is to be loaded into: what it takes of it."""
        if is_stateful(value):
            value = value.state_dict()
        if isinstance(value, Mapping):
            for key, child in value.items():
                yield from self.in_value(child, (*path, key))
        elif isinstance(value, list):
            for index, child in enumerate(value):
                yield from self.in_value(child, (*path, index))
        elif self.takes(path):
            yield path
