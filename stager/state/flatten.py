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
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from stager.state.per_rank import PerRank, rank_key
from stager.workers.checkpoint.layout.structure import Key, Node, Path, describe, fqn, walk
from stager.workers.errors import UnstageableError

_MAX_DEPTH = 100
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
"""What is nothing but its bytes, unless its layout says otherwise."""


@runtime_checkable
class Stateful(Protocol):
    """An object that can give and take its state: a module, an optimizer, a scheduler, a data loader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> bool:
    """As ``isinstance(value, Stateful)``, which is slow to ask, for what is not a container or a tensor."""
    return (
        hasattr(value, "state_dict")
        and hasattr(value, "load_state_dict")
        and not isinstance(value, (Mapping, list, torch.Tensor, type))
    )


@dataclass
class StateTree:
    """Attributes:
    leaves: the values; the structure's leaves number them, in order.
    structure: see :mod:`stager.workers.checkpoint.layout.structure`.
    odd_keys: of each mapping with keys other than ``str``, what tells ``1``, ``True`` and ``1.0`` apart, which are equal.
    private: leaves of which each rank has its own (``PerRank``).
    kinds: dtype and number of dimensions of the tensors that this rank leaves to others.
    rank: whose values those of ``PerRank`` are.
    owners: objects whose state is being visited.
    """

    leaves: list[Any] = field(default_factory=list)
    structure: Node = None
    odd_keys: list[tuple[Any, ...]] = field(default_factory=list)
    private: set[int] = field(default_factory=set)
    kinds: frozenset[tuple[str, int]] = frozenset()
    rank: int = 0
    owners: list[Any] = field(default_factory=list)

    @cached_property
    def paths(self) -> list[Path]:
        """Of each leaf. Only a new plan and errors need them, so they are made when asked for."""
        return [path for path, _ in walk(self.structure)]

    def name(self, leaf: int) -> str:
        """A leaf as a user would write it."""
        return describe(self.paths[leaf])

    def check_names(self) -> None:
        """
        Raises:
            UnstageableError: two leaves have one name in the checkpoint.
        """
        names = [fqn(path) for path in self.paths]
        if len(set(names)) == len(names):
            return
        seen: dict[str, Path] = {}
        for name, path in zip(names, self.paths, strict=True):
            if name in seen:
                raise UnstageableError(
                    describe(path),
                    f"has the same name in the checkpoint as {describe(seen[name])}: {name!r}; rename one",
                )
            seen[name] = path


def flatten(state: Mapping[str, Any], rank: int = 0) -> StateTree:
    """Every leaf of ``state``.

    Args:
        rank: whose values those of ``PerRank`` are.

    Raises:
        UnstageableError: a key that cannot be stored, or a state that contains itself.
    """
    if not isinstance(state, Mapping):
        raise UnstageableError("state", f"must be a mapping of names to values, not {type(state).__name__}")
    flat = StateTree(rank=rank)
    flat.structure = _visit(flat, state, ())
    return flat


def _visit(flat: StateTree, value: Any, path: Path) -> Node:
    leaves = flat.leaves
    if isinstance(value, torch.Tensor):  # nearly every leaf, and the abstract base classes below are slow to ask
        leaves.append(value)
        return len(leaves) - 1
    if len(path) > _MAX_DEPTH:
        raise UnstageableError(describe(path[:4]), f"nested deeper than {_MAX_DEPTH}; does it contain itself?")
    if type(value) is dict or not is_stateful(value):
        return _visit_plain(flat, value, path)
    flat.owners.append(value)
    node = _visit_plain(flat, value.state_dict(), path)
    flat.owners.pop()
    return node


def _visit_plain(flat: StateTree, value: Any, path: Path) -> Node:
    """What is taken as it stands, a state dict among others."""
    if type(value) is PerRank:
        return _visit_private(flat, value, path)
    if isinstance(value, Mapping):
        return _visit_mapping(flat, value, path)
    leaves = flat.leaves
    if isinstance(value, list) and not _is_terminal(value, len(path)):
        return ["list", [_visit(flat, child, (*path, i)) for i, child in enumerate(value)]]
    leaves.append(value)
    return len(leaves) - 1


def _visit_private(flat: StateTree, value: PerRank, path: Path) -> Node:
    if flat.owners:  # load_state_dict() would be given what all ranks have
        raise UnstageableError(
            describe(path),
            f"is PerRank inside the state of a {type(flat.owners[-1]).__name__}; make the whole of it PerRank",
        )
    key, first = rank_key(flat.rank), len(flat.leaves)
    node = ["dict", [key], [_visit(flat, value.value, (*path, key))]]
    flat.private.update(range(first, len(flat.leaves)))
    return node


def _visit_mapping(flat: StateTree, value: Mapping[Any, Any], path: Path) -> Node:
    keys = list(value)
    kinds = set(map(type, keys))
    if kinds - {str}:
        keys = [_check_key(key, path) for key in keys]
        flat.odd_keys.append(tuple(map(type, keys) if float not in kinds else map(repr, keys)))
    leaves, values = flat.leaves, list(value.values())
    if PLAIN_TENSORS.issuperset(map(type, values)):  # what most states are made of
        children = list(range(len(leaves), len(leaves) + len(values)))
        leaves += values
    else:
        children = [_visit(flat, child, (*path, key)) for key, child in zip(keys, values, strict=True)]
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
        if isinstance(entry, (Mapping, torch.Tensor, PerRank)) or is_stateful(entry):
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
