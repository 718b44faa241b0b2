"""From a state as users give it to a state tree: its leaves (tensors and objects), and the structure that holds them.

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
"""The plain-tensor test: tensors of these types are nothing but their bytes, unless their layout says otherwise."""


@runtime_checkable
class Stateful(Protocol):
    """An object that can give and take its state: a module, an optimizer, a scheduler, a data loader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> bool:
    """Tell whether a value that is no container and no tensor is Stateful. ``isinstance(value, Stateful)`` is slow."""
    return (
        hasattr(value, "state_dict")
        and hasattr(value, "load_state_dict")
        and not isinstance(value, (Mapping, list, torch.Tensor, type))
    )


KeyTypes = tuple[Any, ...]
"""What tells apart the keys of one mapping: their types, or their ``repr`` if a float is among them."""

TensorKind = tuple[str, int]
"""The dtype's name and the number of dimensions of a tensor."""


@dataclass
class StateTree:
    """A nested state: its leaves, and the structure that holds them.

    Attributes:
        leaves: the values. The structure numbers them, in order.
        structure: see :mod:`stager.workers.checkpoint.layout.structure`.
        odd_keys: one entry for each mapping that has keys other than ``str``. ``1``, ``True`` and ``1.0`` are equal as keys;
            the entries tell them apart.
        private: numbers of the leaves of which each rank has its own (:class:`PerRank`).
        kinds: the kinds of tensors that other ranks write.
        rank: the rank whose ``PerRank`` values these are.
        owners: the Stateful objects whose state is being visited, outermost first.
    """

    leaves: list[Any] = field(default_factory=list)
    structure: Node = None
    odd_keys: list[KeyTypes] = field(default_factory=list)
    private: set[int] = field(default_factory=set)
    kinds: frozenset[TensorKind] = frozenset()
    rank: int = 0
    owners: list[Any] = field(default_factory=list)

    @cached_property
    def paths(self) -> list[Path]:
        """The key path of each leaf, made when asked for: only a new plan and errors need them."""
        return [path for path, _ in walk(self.structure)]

    def name(self, leaf: int) -> str:
        """Write the key path of a leaf as a user would."""
        return describe(self.paths[leaf])

    def check_names(self) -> None:
        """Check that no two leaves have the same name in the checkpoint.

        Raises:
            UnstageableError: two have.
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
    """Make the state tree of ``state``.

    Args:
        rank: the rank whose ``PerRank`` values these are.

    Raises:
        UnstageableError: a key that cannot be stored, or a state that contains itself.
    """
    if not isinstance(state, Mapping):
        raise UnstageableError("state", f"must be a mapping of names to values, not {type(state).__name__}")
    tree = StateTree(rank=rank)
    tree.structure = _visit(tree, state, ())
    return tree


def _visit(tree: StateTree, value: Any, path: Path) -> Node:
    leaves = tree.leaves
    if isinstance(value, torch.Tensor):  # nearly every leaf, and the abstract base classes below are slow to ask
        leaves.append(value)
        return len(leaves) - 1
    if len(path) > _MAX_DEPTH:
        raise UnstageableError(
            describe(path[:4]), f"is nested deeper than {_MAX_DEPTH} levels; does it contain itself?"
        )
    if type(value) is dict or not is_stateful(value):
        return _visit_plain(tree, value, path)
    tree.owners.append(value)
    node = _visit_plain(tree, value.state_dict(), path)
    tree.owners.pop()
    return node


def _visit_plain(tree: StateTree, value: Any, path: Path) -> Node:
    """Visit a value that is not asked for its ``state_dict()``."""
    if type(value) is PerRank:
        return _visit_private(tree, value, path)
    if isinstance(value, Mapping):
        return _visit_mapping(tree, value, path)
    leaves = tree.leaves
    if isinstance(value, list) and not _is_terminal(value, len(path)):
        return ["list", [_visit(tree, child, (*path, i)) for i, child in enumerate(value)]]
    leaves.append(value)
    return len(leaves) - 1


def _visit_private(tree: StateTree, value: PerRank, path: Path) -> Node:
    if tree.owners:  # load_state_dict() would be given the values of all ranks
        raise UnstageableError(
            describe(path),
            f"is a PerRank value inside the state of a {type(tree.owners[-1]).__name__}; wrap that whole object in PerRank",
        )
    key, first = rank_key(tree.rank), len(tree.leaves)
    node = ["dict", [key], [_visit(tree, value.value, (*path, key))]]
    tree.private.update(range(first, len(tree.leaves)))
    return node


def _visit_mapping(tree: StateTree, value: Mapping[Any, Any], path: Path) -> Node:
    keys = list(value)
    kinds = set(map(type, keys))
    if kinds - {str}:
        keys = [_check_key(key, path) for key in keys]
        tree.odd_keys.append(tuple(map(type, keys) if float not in kinds else map(repr, keys)))
    leaves, values = tree.leaves, list(value.values())
    if PLAIN_TENSORS.issuperset(map(type, values)):  # what most states are made of
        children = list(range(len(leaves), len(leaves) + len(values)))
        leaves += values
    else:
        children = [_visit(tree, child, (*path, key)) for key, child in zip(keys, values, strict=True)]
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
    """Tell whether DCP takes a list as a leaf: no tensor, mapping or such a list is in it."""
    if depth > _MAX_DEPTH:
        return True
    for entry in values:
        if isinstance(entry, (Mapping, torch.Tensor, PerRank)) or is_stateful(entry):
            return False
        if isinstance(entry, list) and not _is_terminal(entry, depth + 1):
            return False
    return True


def _plain(metadata: Any) -> dict[str, dict[str, int]] | None:
    """Keep only the version numbers that ``nn.Module.state_dict`` adds to its result."""
    if not isinstance(metadata, Mapping):
        return None
    return {
        str(name): {k: v for k, v in entry.items() if isinstance(k, str) and type(v) in (int, str, bool)}
        for name, entry in metadata.items()
        if isinstance(entry, Mapping)
    }
