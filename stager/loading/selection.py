"""Selecting a part of a checkpoint by the names of its keys."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stager.config.arguments import shown
from stager.loading.nodes import children_of, is_plain_mapping, state_of
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Node, Path, fqn, is_recipe, is_with_recipe, walk
from stager.workers.errors import ArgumentError, StateMismatchError, UsageError

_MOST_COMPARED = 5000  # names among which a pattern's near names are looked for


class Selection:
    """Selects what has a name that matches a pattern, and all that is in it.

    The name of a value is its keys, joined by dots. A list is selected whole if something in it is: without the others, its
    elements would have other positions.

    Args:
        keys: patterns (``model.*.weight``): ``*`` and ``?`` as in a shell; ``*`` matches dots too, and brackets are literal.

    Raises:
        ArgumentError: ``keys`` is neither.
        UsageError: a pattern is no text.
    """

    def __init__(self, keys: str | Sequence[str]) -> None:
        if not isinstance(keys, Iterable):
            raise ArgumentError(
                f'keys must be a pattern or a list of patterns, as in keys="model.*", got {shown(keys)}'
            )
        self._patterns = [keys] if isinstance(keys, str) else list(keys)
        for pattern in self._patterns:
            if not isinstance(pattern, str):
                raise UsageError(f"keys= has {pattern!r}, a {type(pattern).__name__}; each of them has to be a text")
        self._matches = _compile(self._patterns)

    def takes(self, path: Path) -> bool:
        """Whether the value at ``path`` is selected: by its name, or by that of what it is in."""
        return self._matches(fqn(path)) is not None

    def of(self, structure: Node, path: str) -> Node:
        """Return the selected part of a checkpoint's structure.

        Raises:
            StateMismatchError: nothing in the checkpoint at ``path`` matches one of the patterns.
        """
        names = list(map(fqn, _values(structure)))
        for pattern in self._patterns:
            if not any(map(_compile([pattern]), names)):
                raise StateMismatchError(
                    f"{path}: no key matches keys={pattern!r}; nothing was done. {_near(pattern, structure, names)}"
                )
        selected = self._visit(structure, ())
        if selected is None:
            raise StateMismatchError(
                f"{path}: no key matches keys={self._patterns!r}; nothing was done; leave keys out to take everything"
            )
        return selected

    def check_target(self, structure: Node, names: Iterable[Any], path: str) -> None:
        """Check that each pattern selects something that the target has.

        Args:
            structure: of the checkpoint.
            names: at the top of the target.
            path: of the checkpoint, for messages.

        Raises:
            StateMismatchError: one does not.
        """
        present = set(map(str, names))
        values = [(str(value[0]), fqn(value)) for value in _values(structure) if not is_recipe(value)]
        for pattern in self._patterns:
            matches = _compile([pattern])
            selected = {head for head, name in values if matches(name)}
            if selected and not selected & present:
                raise StateMismatchError(
                    f"{path}: keys={pattern!r} selects {', '.join(sorted(selected))}, which the target (what was given as "
                    f"into) does not have; nothing was changed. It has {', '.join(sorted(present)) or 'nothing'}"
                )

    def _visit(self, node: Node, path: Path) -> Node | None:
        if type(node) is int or node[0] in ("chunks", "tensor"):
            return node if self.takes(path) else None
        if node[0] == "list" or is_with_recipe(node):
            return node if self.takes(path) or any(self.takes(leaf) for leaf, _ in walk(node, path)) else None
        kept = [
            (key, child)
            for key, value in zip(node[1], node[2], strict=True)
            if (child := self._visit(value, (*path, key))) is not None
        ]
        if not kept and not self.takes(path):
            return None
        return [node[0], [key for key, _ in kept], [child for _, child in kept], *node[3:]]

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


def _compile(patterns: Iterable[str]) -> Any:
    """Make the test of whether a name matches a pattern, or is that of something in what matches.

    Only ``*`` and ``?`` are special: a key may have brackets.
    """
    each = [fnmatch.translate(part.replace("[", "[[]")) for pattern in patterns for part in (pattern, f"{pattern}.*")]
    return re.compile("|".join(each) or r"(?!)").match


def _values(node: Node, path: Path = ()) -> Iterator[Path]:
    """Iterate over the paths of the leaves, and of the containers without leaves."""
    if is_plain_mapping(node):
        if not node[1] and path:
            yield path
        for key, child in children_of(node).items():
            yield from _values(child, (*path, key))
    else:
        leaves = [leaf for leaf, _ in walk(node, path)]
        yield from leaves or ([path] if path else [])


def _near(pattern: str, structure: Node, names: Sequence[str]) -> str:
    """Say which names a pattern may have meant."""
    if any(map(_compile([f"*.{pattern}"]), names)):
        return f"keys={f'*.{pattern}'!r} would match: a name begins at the top of the checkpoint"
    candidates: dict[str, None] = dict.fromkeys(map(str, children_of(structure)))
    for name in itertools.islice(names, _MOST_COMPARED):
        parts = name.split(".")
        candidates |= dict.fromkeys(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    near = difflib.get_close_matches(pattern, list(candidates)[:_MOST_COMPARED], n=3)
    if near:
        return f"Similar names: {', '.join(near)}"
    shown = list(map(str, children_of(structure)))
    return f"The names at the top are {', '.join(shown[:8]) or 'none'}{', ...' if len(shown) > 8 else ''}"
