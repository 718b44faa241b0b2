"""Splitting a new name into keys. Both keys and modules have dots in their names, so a name alone does not tell its keys.

1. target      keys that the target has, with their types, as far as its plain mappings go
2. checkpoint  else, mappings that the checkpoint has
3. old keys    the rest has as many keys, of as many words, as it had; what has been put in front of it is one key a word

In a mapping whose keys have dots, as the state dict of a module has, the last key takes all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stager.loading.nodes import children_of, is_mapping
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Key, Node, Path

_KEY_TYPES = (str, int, float, bool, type(None))


class Splitter:
    """Splits the new names of one checkpoint.

    Args:
        structure: of the checkpoint, with the old names.
        target: what is loaded into; None if nothing is.
    """

    def __init__(self, structure: Node, target: Any) -> None:
        self._structure = structure
        self._target = target
        self._keys: dict[int, tuple[Any, dict[str, Any]]] = {}  # by identity: a mapping or node, its keys by their text
        self._is_flat: dict[int, bool] = {}

    def split(self, name: str, path: Path, inside: Node) -> Path:
        """Return the keys of a new name.

        Args:
            path: the old keys.
            inside: the mapping that has the value in the checkpoint.
        """
        words = name.split(".")
        head, at = self._in_target(words)
        if head:
            words = words[_num_words(head) :]
        else:
            head = self._in_checkpoint(words)
            words = words[_num_words(head) :]
        if not words:
            return head
        old = path[len(head) :] or path[-1:]
        if isinstance(at, torch.nn.Module):
            return (*head, _like(old[-1], ".".join(words)))
        is_flat = self._has_dots(inside)
        kept = _common_end(words, old)
        if is_flat and len(words) - _num_words(kept) >= _num_words(old[: len(old) - len(kept)]):
            kept = ()  # what is put in front of a key with dots becomes a part of it
        words = words[: len(words) - _num_words(kept)]
        return (*head, *_by_old_keys(words, old[: len(old) - len(kept)], is_flat=is_flat and not kept), *kept)

    def _in_target(self, words: list[str]) -> tuple[Path, Any]:
        """Return the first keys of a name that the target has, and the value that is there."""
        keys: list[Key] = []
        value = self._target
        while words and isinstance(value, Mapping) and not is_stateful(value):
            texts = self._texts(value, value)
            length = _longest(words, texts)
            if not length:
                break
            key = texts[".".join(words[:length])]
            keys.append(key)
            words = words[length:]
            try:
                value = value[key]
            except Exception:  # noqa: BLE001  # the class's own code; matching tells of it
                break
        return tuple(keys), value

    def _in_checkpoint(self, words: list[str]) -> Path:
        """Return the first keys of a name that are mappings of the checkpoint. At least one word is left."""
        keys: list[Key] = []
        node = self._structure
        while len(words) > 1:
            nodes = children_of(node)
            texts = self._texts(
                node, [key for key, child in nodes.items() if is_mapping(child) and child[0] != "mapping"]
            )
            length = _longest(words[:-1], texts)
            if not length:
                break
            keys.append(texts[".".join(words[:length])])
            node, words = nodes[keys[-1]], words[length:]
        return tuple(keys)

    def _texts(self, owner: Any, keys: Any) -> dict[str, Any]:
        if id(owner) not in self._keys:
            self._keys[id(owner)] = owner, {str(key): key for key in keys if isinstance(key, _KEY_TYPES)}
        return self._keys[id(owner)][1]

    def _has_dots(self, node: Node) -> bool:
        if id(node) not in self._is_flat:
            is_module = node[0] == "odict" and len(node) > 3 and node[3] is not None
            self._is_flat[id(node)] = is_module or any("." in str(key) for key in node[1])
        return self._is_flat[id(node)]


def _longest(words: list[str], texts: Mapping[str, Any]) -> int:
    """How many of the words are the longest of some texts; 0: none of them is."""
    return next((length for length in range(len(words), 0, -1) if ".".join(words[:length]) in texts), 0)


def _num_words(keys: Path) -> int:
    return sum(str(key).count(".") + 1 for key in keys)


def _common_end(words: list[str], old: Path) -> Path:
    """Return the last old keys with which a new name ends."""
    kept = 0
    left = len(words)
    for key in reversed(old):
        text = str(key).split(".")
        if words[max(left - len(text), 0) : left] != text:
            break
        left -= len(text)
        kept += 1
    return old[len(old) - kept :]


def _by_old_keys(words: list[str], old: Path, *, is_flat: bool) -> Path:
    """Split words as old keys are split. The last of ``old`` takes all the rest if ``is_flat``."""
    keys: list[Key] = []
    for key in old[:-1]:
        num_words = str(key).count(".") + 1
        if len(words) <= num_words:
            break
        keys.append(_like(key, ".".join(words[:num_words])))
        words = words[num_words:]
    if words and is_flat:
        return (*keys, _like(old[-1], ".".join(words)))
    return (*keys, *(_like(old[-1] if old else "", word) for word in words))


def _like(old: Key, text: str) -> Key:
    """Give a new key the type of the old one, if the text is one of such a key."""
    if text == str(old):
        return old
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        try:
            new = type(old)(text)
        except ValueError:
            return text
        return new if str(new) == text else text
    return text
