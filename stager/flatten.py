"""From a state as users give it to leaves: tensors and objects, each with its path, and the structure that holds them.

What is a container and what a leaf follows ``torch.distributed.checkpoint`` (``_traverse.traverse_state_dict``), so that a
stock ``dcp.load`` with the same state finds the same names: mappings are containers; a list is one if a tensor, a mapping
or such a list is in it; everything else, tuples included, is a leaf. In addition, any value with ``state_dict()`` and
``load_state_dict()`` stands for its state dict, at any depth.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from workers.errors import UnstageableError
from workers.structure import Key, Node, Path, describe, fqn

_MAX_DEPTH = 100


@runtime_checkable
class Stateful(Protocol):
    """An object that can give and take its state: a module, an optimizer, a scheduler, a data loader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> bool:
    return not isinstance(value, (Mapping, list, torch.Tensor, type)) and isinstance(value, Stateful)


@dataclass(slots=True)
class Flat:
    """Attributes:
    paths: of each leaf.
    leaves: the values; the structure's leaves number them.
    structure: see :mod:`workers.structure`.
    """

    paths: list[Path] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    structure: Node = None


def flatten(state: Mapping[str, Any]) -> Flat:
    """Every leaf of ``state``.

    Raises:
        UnstageableError: a key that cannot be stored, two leaves of one name, or a state that contains itself.
    """
    if not isinstance(state, Mapping):
        raise UnstageableError("state", f"must be a mapping of names to values, not {type(state).__name__}")
    flat = Flat()
    flat.structure = _visit(flat, state, ())
    _check_names(flat)
    return flat


def _visit(flat: Flat, value: Any, path: Path) -> Node:
    if isinstance(value, torch.Tensor):  # nearly every leaf, and the abstract base classes below are slow to ask
        return _leaf(flat, value, path)
    if len(path) > _MAX_DEPTH:
        raise UnstageableError(describe(path[:4]), f"nested deeper than {_MAX_DEPTH}; does it contain itself?")
    if is_stateful(value):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return _visit_mapping(flat, value, path)
    if isinstance(value, list) and not _is_terminal(value, len(path)):
        return ["list", [_visit(flat, child, (*path, i)) for i, child in enumerate(value)]]
    return _leaf(flat, value, path)


def _leaf(flat: Flat, value: Any, path: Path) -> int:
    flat.paths.append(path)
    flat.leaves.append(value)
    return len(flat.leaves) - 1


def _visit_mapping(flat: Flat, value: Mapping[Any, Any], path: Path) -> Node:
    keys = [_check_key(key, path) for key in value]
    children = [_visit(flat, child, (*path, key)) for key, child in value.items()]
    if isinstance(value, OrderedDict):
        metadata = getattr(value, "_metadata", None)
        return ["odict", keys, children, _plain(metadata)]
    return ["dict", keys, children]


def _check_key(key: Any, path: Path) -> Key:
    if type(key) is str or key is None or type(key) in (int, bool) or (type(key) is float and math.isfinite(key)):
        return key  # type: ignore[no-any-return]  # its type was just checked
    raise UnstageableError(
        describe(path), f"has the key {key!r} of type {type(key).__name__}; use str, int, float, bool or None"
    )


def _is_terminal(values: list[Any], depth: int) -> bool:
    """Whether a list is a leaf, as DCP sees it."""
    if depth > _MAX_DEPTH:
        return True
    for entry in values:
        if isinstance(entry, (Mapping, torch.Tensor)) or is_stateful(entry):
            return False
        if isinstance(entry, list) and not _is_terminal(entry, depth + 1):
            return False
    return True


def _plain(metadata: Any) -> dict[str, dict[str, int]] | None:
    """The version numbers that ``nn.Module.state_dict`` adds; anything else hung there is not ours to keep."""
    if not isinstance(metadata, Mapping):
        return None
    return {
        str(name): {k: v for k, v in entry.items() if isinstance(k, str) and type(v) in (int, str, bool)}
        for name, entry in metadata.items()
        if isinstance(entry, Mapping)
    }


def _check_names(flat: Flat) -> None:
    names = [fqn(path) for path in flat.paths]
    if len(set(names)) == len(names):
        return
    seen: dict[str, Path] = {}
    for name, path in zip(names, flat.paths, strict=True):
        if name in seen:
            raise UnstageableError(
                describe(path), f"has the same name in the checkpoint as {describe(seen[name])}: {name!r}; rename one"
            )
        seen[name] = path
