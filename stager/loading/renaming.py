"""Names of a checkpoint as the target has them: ``rename=`` and ``strip_prefix=``.

A name is what ``keys=`` and ``Loaded.missing`` have, too: keys joined by dots (``model.encoder.weight``). The structure of
the checkpoint is given new keys before it is matched with anything, so everything else sees the new names only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stager.loading.nodes import children_of, is_plain_mapping
from stager.loading.splitting import Splitter
from stager.workers.checkpoint.layout.structure import Key, Node, Path, fqn
from stager.workers.errors import StateMismatchError, UsageError

Rename = Mapping[str, str] | Callable[[str], str]


def _as_it_is(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class Renaming:
    """How names of the checkpoint become names of the target.

    Attributes:
        rename: of each leaf; applied after ``strip_prefix``. A mapping may also name what is above leaves:
            ``{"encoder": "body"}`` renames all that is in ``encoder``. A list, and what is in it, has one name.
        strip_prefix: what keys lose if they begin with it, at any level; ``""`` for nothing. If only the target's keys have
            it, the checkpoint's keys get it.
    """

    rename: Rename = _as_it_is
    strip_prefix: str = ""

    @staticmethod
    def of_arguments(rename: Rename | None, strip_prefix: str | None) -> Renaming:
        """Take the arguments of ``load()``.

        Raises:
            UsageError: they are of another type.
        """
        if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
            raise UsageError(
                f"rename= is a {type(rename).__name__}; give a mapping of names of the checkpoint to names of the target, "
                "or a function that returns the new name"
            )
        if strip_prefix is not None and not isinstance(strip_prefix, str):
            raise UsageError(f"strip_prefix= is a {type(strip_prefix).__name__}; give a text, for example 'module.'")
        return Renaming(_as_it_is if rename is None else rename, strip_prefix or "")

    def of(self, structure: Node, path: str, target: Any = None) -> Node:
        """Return the structure of a checkpoint with the new names.

        Args:
            path: of the checkpoint, for messages.
            target: what is loaded into; tells which keys a new name consists of.

        Raises:
            StateMismatchError: two values would have one name.
            UsageError: ``rename`` returned something else than a text.
        """
        if self.strip_prefix:
            structure = _Builder(lambda old, inside: self._stripped(old), path).build(structure)
        if self.rename is not _as_it_is:
            splitter = Splitter(structure, target)
            builder = _Builder(lambda old, inside: self._renamed(old, inside, splitter), path)
            structure = builder.build(structure)
            check_used(self.rename, builder.names(), path)
        return structure

    def aligned(self, node: Node, keys: Iterable[Any]) -> Node:
        """Give the keys of a mapping the prefix that only the target's ``keys`` have."""
        if not self.strip_prefix or not is_plain_mapping(node):
            return node
        wanted = set(keys)
        longer = {key: self.strip_prefix + key for key in node[1] if isinstance(key, str)}
        if not any(new in wanted and key not in wanted for key, new in longer.items()):
            return node
        renamed = {key: new if new in wanted else key for key, new in longer.items()}
        keys_now = [renamed.get(key, key) if isinstance(key, str) else key for key in node[1]]
        return [node[0], keys_now, node[2], *_metadata(node[3:], renamed)]

    def _stripped(self, path: Path) -> Path:
        prefix = self.strip_prefix
        return tuple(
            key[len(prefix) :] if isinstance(key, str) and key.startswith(prefix) and key != prefix else key
            for key in path
        )

    def _renamed(self, path: Path, inside: Node, splitter: Splitter) -> Path:
        name = fqn(path)
        new = new_name(self.rename, name)
        if not isinstance(new, str) or not new:
            raise UsageError(f"rename= made {new!r} of {name!r}; it has to be a text that is not empty")
        return path if new == name else splitter.split(new, path, inside)


def new_name(rename: Mapping[str, Any] | Callable[[str], Any], name: str) -> Any:
    """Return what ``rename`` makes of a name. In a mapping, the longest beginning of the name that is there counts.

    None in a mapping is returned as it is, whatever is below it.
    """
    if not isinstance(rename, Mapping):
        return rename(name)
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        if head in rename:
            new = rename[head]
            return new if new is None else ".".join([new, *parts[length:]])
    return name


def check_used(rename: Mapping[str, Any] | Callable[[str], Any], names: Sequence[str], path: str) -> None:
    """Raise if a mapping renames what is not there.

    Args:
        names: of the leaves.
        path: of the checkpoint, for the message.

    Raises:
        StateMismatchError
    """
    if not isinstance(rename, Mapping):
        return
    heads = {name[:end] for name in names for end in (*_dots(name), len(name))}
    for name in rename:
        if name not in heads:
            near = difflib.get_close_matches(str(name), names, n=3)
            advice = f"Similar names: {', '.join(near)}" if near else "stager inspect lists its names"
            raise StateMismatchError(
                f"{path}: rename= has {name!r}, which is no name of the checkpoint; nothing was changed. {advice}"
            )


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


class _Builder:
    """Builds a structure with other keys. What is no ``dict`` or ``OrderedDict`` moves as a whole."""

    def __init__(self, new_path: Callable[[Path, Node], Path], path: str) -> None:
        self._new_path = new_path
        self._path = path
        self._old: dict[Path, Path] = {}

    def build(self, structure: Node) -> Node:
        if not is_plain_mapping(structure):
            return structure
        root = _Mapping(structure)
        self._visit(structure, (), root, (structure,))
        return root.to_node()

    def names(self) -> list[str]:
        """Return the old names of what was given new ones."""
        return list(map(fqn, self._old.values()))

    def _visit(self, node: Node, path: Path, root: _Mapping, above: tuple[Node, ...]) -> None:
        """Put what is in a mapping under its new path. ``above``: the mappings that it is in, and itself."""
        for key, child in zip(node[1], node[2], strict=True):
            at = (*path, key)
            if is_plain_mapping(child) and child[1]:
                self._visit(child, at, root, (*above, child))
            else:
                self._put(child, at, root, above)

    def _put(self, node: Node, path: Path, root: _Mapping, above: tuple[Node, ...]) -> None:
        new = self._new_path(path, above[-1])
        if (other := self._old.setdefault(new, path)) != path:
            raise StateMismatchError(
                f"{self._path}: rename= or strip_prefix= gives {fqn(path)} and {fqn(other)} the same name, {fqn(new)}; "
                "nothing was changed"
            )
        into = root
        into.has_moved(path, new, 0)
        for depth, key in enumerate(new[:-1], 1):
            inner = into.entries.get(key)
            if inner is None:
                inner = into.entries[key] = _Mapping(_like(path, new, depth, above))
            if not isinstance(inner, _Mapping):
                raise StateMismatchError(
                    f"{self._path}: rename= puts {fqn(new)} into {fqn(new[:depth])}, which is a single value; "
                    "nothing was changed"
                )
            into = inner
            into.has_moved(path, new, depth)
        if isinstance(into.entries.get(new[-1]), _Mapping):
            raise StateMismatchError(
                f"{self._path}: rename= gives a value and a mapping the same name, {fqn(new)}; nothing was changed"
            )
        into.entries[new[-1]] = node


class _Mapping:
    """A mapping that is being built, of the same kind as another."""

    def __init__(self, like: Node) -> None:
        self._like = like
        self._moved: dict[Key, Key] = {}
        self.entries: dict[Key, Any] = {}

    def has_moved(self, old: Path, new: Path, depth: int) -> None:
        """Note the old key of an entry that is the last key of its path."""
        if len(new) == depth + 1 and isinstance(old[-1], str):
            self._moved[old[-1]] = new[-1]

    def to_node(self) -> Node:
        children = [child.to_node() if isinstance(child, _Mapping) else child for child in self.entries.values()]
        return [self._like[0], list(self.entries), children, *_metadata(self._like[3:], self._moved)]


def _metadata(metadata: list[Any], moved: Mapping[Any, Any]) -> list[Any]:
    """Move the versions of a module's parts with their parameters: ``{"module.norm": {"version": 2}}``."""
    if not metadata or metadata[0] is None:
        return metadata
    parts = {str(old).rpartition(".")[0]: str(new).rpartition(".")[0] for old, new in moved.items()}
    return [{**metadata[0], **{new: metadata[0][old] for old, new in parts.items() if old in metadata[0]}}]


def _like(old: Path, new: Path, depth: int, above: Sequence[Node]) -> Node:
    """Return the mapping that the one at ``new[:depth]`` is like: at the same depth the old one, else the one there."""
    if len(old) == len(new):
        return above[depth]
    there: Node | None = above[0]
    for key in new[:depth]:
        there = children_of(there).get(key) if there is not None and is_plain_mapping(there) else None
    return there if there is not None and is_plain_mapping(there) else ["dict", [], []]
