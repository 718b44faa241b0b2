"""Names that only one side has, the target or the checkpoint, and what becomes of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from typing import Any

import torch

from stager.loading.belongings import holds_belongings, tensor_paths
from stager.loading.extras import Extras, OtherRanks
from stager.loading.match_torch import nothing_fits
from stager.loading.nodes import children_of, is_mapping, readable_items
from stager.loading.prefixes import find_prefixes
from stager.loading.replacing import Replacer
from stager.loading.restore_plan import Values
from stager.loading.selection import Selection
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.structure import Node, Path
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node


class Owner(Enum):
    """Whose a mapping is, and so what becomes of names that only one side has.

    NOBODY   data: entries are added and removed
    OBJECT   the state of an object, given to its ``load_state_dict()``; or a mapping of which keys= selects a part
    MODULE   the state dict of a module, in a plain container: its owner wants these names and no others
    """

    NOBODY = "nobody"
    OBJECT = "an object"
    MODULE = "a module"


class OneSided:
    """Plans what becomes of the names that only one side has.

    Args:
        replacer: puts values into containers; its plan is added to.
        extras: gets the names that the target lacks.
        selection: the part of the target that is restored.
    """

    def __init__(self, replacer: Replacer, extras: Extras, selection: Selection | None) -> None:
        self._plan = replacer.plan
        self._replacer = replacer
        self._extras = extras
        self._selection = selection
        self._last: list[tuple[Path, Callable[[Values], None]]] = []

    def at_the_end(self, path: Path, run: Callable[[Values], None]) -> None:
        """Plan a step that comes after all others."""
        self._last.append((path, run))

    def missing(self, value: Any, path: Path) -> None:
        """Note that ``value`` is in the target and not in the checkpoint."""
        self._note_shape(value, path)
        if self._selection is None:
            self._plan.missing.append(path)
        else:
            self._plan.missing += self._selection.in_value(value, path)

    def _note_shape(self, value: Any, path: Path) -> None:
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_nested:
            self._plan.shapes[path] = tuple(value.shape)

    def settle(self, other_ranks: OtherRanks) -> None:
        """Decide on names that only the checkpoint has, and plan what comes last."""
        self._extras.settle(other_ranks)
        for path, step in self._last:
            self._plan.then(path, step)

    def check_unfit(self, nodes: Mapping[Any, Node], value: Mapping[Any, Any], path: Path, owner: Owner) -> None:
        """Note a mapping of tensors, none of which the checkpoint has, though it has others there."""
        if not any(isinstance(one, torch.Tensor) for _, one in readable_items(value)):
            return
        if not any(is_tensor(child, self._replacer.items) for child in nodes.values()):
            return
        here, there = [(*path, key) for key in value], [(*path, name) for name in nodes]
        if len(path) == 1 or owner is Owner.MODULE or find_prefixes(here, there):
            self._plan.unfit.append((path, nothing_fits(path, value, nodes)))

    def keep_order(self, node: Node, value: MutableMapping[Any, Any], path: Path) -> None:
        """Plan to give a mapping the order of the checkpoint."""
        wanted = list(children_of(node))
        if node[0] != "mapping" and list(value) != wanted:

            def sort(values: Values) -> None:
                entries = {key: value[key] for key in wanted if key in value} | dict(value)
                if list(entries) != list(value):
                    value.clear()
                    value.update(entries)

            self._last.append((path, sort))

    def absent(self, container: Any, key: Any, path: Path, owner: Owner) -> None:
        """Match an entry of a mapping that the checkpoint does not have: data is removed."""
        value = container[key]
        if owner is not Owner.NOBODY or holds_belongings(value):
            self.missing(value, path)
        elif (refusal := self._replacer.refusal(container, key)) is not None:
            self._plan.problems.append(self._replacer.refused(container, path, refusal))
        else:
            self._note_shape(value, path)
            self._plan.dropped += tensor_paths(value, path)
            self._last.append((path, lambda values: container.pop(key, None)))

    def extra_entry(
        self, node: Node, position: int, child: Node, mapping: Mapping[Any, Any], path: Path, owner: Owner
    ) -> None:
        """Match an entry of the checkpoint that a mapping of the target lacks."""
        has_objects_only = (
            is_mapping(child) and bool(mapping) and all(is_stateful(one) for _, one in readable_items(mapping))
        )
        is_unexpected = owner is not Owner.NOBODY or has_objects_only
        add = None
        if isinstance(mapping, MutableMapping) and owner is not Owner.MODULE and not has_objects_only:

            def add() -> None:
                self._replacer.add(node, position, child, mapping, path)

        elif not isinstance(mapping, MutableMapping) and not is_unexpected:
            self._plan.add_problem(path, f"is not in the target, and a {type(mapping).__name__} cannot be changed")
        self._plan.note_shape(path, child, self._replacer.items)
        self._extras.note(path, add, is_unexpected=is_unexpected)


def is_tensor(node: Node, items: Items) -> bool:
    """Whether a node is a tensor, with or without flags."""
    return is_tensor_node(node) or (type(node) is int and items.kind_of(node).kind == "tensor")
