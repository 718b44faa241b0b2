"""The state tree: what a state consists of, and the structure that holds it. ``flatten.py`` makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stager.workers.checkpoint.formats.object_pickle import PickledObject
from stager.workers.checkpoint.layout.structure import Node, Path, describe, names_of, walk

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
        has_recipes: whether the format stores containers with recipes; without, they are leaves.
        pickled: large containers that were pickled to find out that they have no tensors, by identity, with
            what they are: an identity may be given to another object when that one is gone.
        has_shards: whether a sharded tensor was met. No leaf is one if it is False.
    """

    leaves: list[Any] = field(default_factory=list)
    structure: Node = None
    odd_keys: list[KeyTypes] = field(default_factory=list)
    private: set[int] = field(default_factory=set)
    kinds: frozenset[TensorKind] = frozenset()
    rank: int = 0
    owners: list[Any] = field(default_factory=list)
    has_recipes: bool = True
    pickled: dict[int, tuple[Any, PickledObject]] = field(default_factory=dict)
    has_shards: bool = False

    @cached_property
    def paths(self) -> list[Path]:
        """The key path of each leaf, made when asked for: only a new plan and errors need them."""
        return [path for path, _ in walk(self.structure)]

    def name(self, leaf: int) -> str:
        """Write the key path of a leaf as a user would."""
        return describe(self.paths[leaf])

    @cached_property
    def names(self) -> list[str]:
        """The name that each leaf has in the checkpoint."""
        return names_of(self.paths)
