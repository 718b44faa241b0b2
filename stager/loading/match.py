"""Matching a checkpoint with the values to restore into: every mismatch is found before a byte of a tensor is read.

The structure of the checkpoint and the target are walked together, which makes a :class:`RestorePlan`. Whether an object of
the checkpoint fits can be told only when it is unpickled; that becomes a *check* of the plan.

A plain container is data, and becomes what the checkpoint has, whatever ``strict`` says: its values are replaced, entries
are added and removed, tensors at the same place are filled. What belongs to somebody (``belongings.py``) is never removed,
and its names have to match.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from stager.loading.belongings import (
    holds_belongings,
    holds_state,
    is_module_node,
    is_module_state,
    looks_like_module_state,
    tensor_paths,
)
from stager.loading.direct_targets import DirectTargets
from stager.loading.extras import NO_OTHER_RANKS, Extras, OtherRanks
from stager.loading.match_objects import (
    TORCH_LOADERS,
    has_sharded,
    is_per_rank,
    match_object_or_none,
    nodes_of_ranks,
    offer_values_of_others,
)
from stager.loading.match_tensor import match_tensor
from stager.loading.match_torch import fit_states, listed, match_module, match_optimizer
from stager.loading.nodes import (
    children_of,
    in_one_order,
    is_list,
    is_mapping,
    kind_of,
    names_and_children,
    state_of,
)
from stager.loading.one_sided import OneSided, Owner, is_tensor
from stager.loading.renaming import Renaming
from stager.loading.replacing import PLAIN_CONTAINERS, Replacer
from stager.loading.restore_plan import RestorePlan, Values
from stager.loading.selection import Selection
from stager.loading.sole_fit import sole_fit
from stager.state.per_rank import PerRank, rank_key
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import ABSENT, Key, Node, Path, describe, is_with_recipe
from stager.workers.checkpoint.layout.tensor_node import without_flags

logger = logging.getLogger("stager")


def match(
    manifest: Manifest,
    path: str,
    target: Any,
    strict: bool,
    selection: Selection | None = None,
    rank: int = 0,
    renaming: Renaming = Renaming(),  # noqa: B008  # frozen
    other_ranks: OtherRanks = NO_OTHER_RANKS,
    fit: Callable[[Node, Any], Node] = lambda structure, target: structure,
    complete: Callable[[Node, Any], Node] = lambda structure, target: structure,
) -> RestorePlan:
    """Plan a restore of a checkpoint into ``target``.

    Args:
        manifest: of the checkpoint.
        path: of the checkpoint, for messages.
        target: see :meth:`stager.loading.restore.Restorer.load_into`.
        strict: missing and unexpected keys are errors.
        selection: the part of the checkpoint, and of ``target``, to restore.
        rank: selects the values of ``PerRank``.
        renaming: of the checkpoint's names; the selection sees the new ones.
        other_ranks: asked which names they have.
        fit: gives the structure the types of keys that the target has, if a format has lost them.
        complete: gives the structure, when its names are new, those that a format does not store.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ.
        UsageError: the target is of no kind that can be restored into.
    """
    structure = fit(manifest.layout.structure, target)
    if renaming != Renaming():
        structure = fit(renaming.of(structure, path, target), target)
    structure = complete(structure, target)
    matcher = _Matcher(manifest, structure, strict, selection, rank, renaming)
    if selection is not None:
        structure = selection.of(structure, path)
    if not isinstance(target, MutableMapping):
        structure, name = sole_fit(structure, manifest.layout.items, target, path, renaming, strict=strict)
        matcher.whole, target = structure, {name: target}
    structure, matcher.whole = renaming.aligned(structure, target), renaming.aligned(matcher.whole, target)
    if selection is not None:
        selection.check_target(structure, target, path)
    matcher.top(structure, target)
    matcher.one_sided.settle(other_ranks)
    matcher.plan.refuse_mismatches(path, strict)
    return matcher.plan


class _Matcher:
    def __init__(
        self,
        manifest: Manifest,
        structure: Node,
        strict: bool,
        selection: Selection | None,
        rank: int,
        renaming: Renaming,
    ) -> None:
        self._rank = rank
        self._is_alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self._items = manifest.layout.items
        self._direct = DirectTargets(self._items)
        self.whole = structure
        self._strict = strict
        self._selection = selection
        self._renaming = renaming
        self.plan = RestorePlan()
        self._extras = Extras(self.plan)
        self._replacer = Replacer(self.plan, self._items, strict=strict)
        self.one_sided = OneSided(self._replacer, self._extras, selection)

    def top(self, node: Node, target: MutableMapping[str, Any]) -> None:
        """Match the names at the top. Those of the checkpoint that the target does not ask for are ignored."""
        names, nodes = names_and_children(node, target)
        self._extras.know((), names.values())
        self._entries(
            target,
            in_one_order(names),
            nodes,
            (),
            Owner.NOBODY,
            lambda key: self.one_sided.missing(target[key], (key,)),
        )
        present = set(names.values())
        self.plan.ignored += [(name,) for name in nodes if name not in present]
        if present and nodes and present.isdisjoint(nodes):
            text = f"the target asks for {listed(present)}, and the checkpoint has {listed(nodes)}: nothing fits"
            self.plan.unfit.append(((), text))

    def entry(self, node: Node, container: Any, key: Key, path: Path, owner: Owner = Owner.NOBODY) -> None:
        """Match ``container[key]`` with a node, and plan how it is restored.

        Args:
            owner: of the container.
        """
        try:
            value = container[key]
        except Exception as error:  # noqa: BLE001  # the class's own code: a config with a value that was never set
            self.plan.cause = error
            self.plan.add_problem(path, f"cannot be read in the target ({type(error).__name__}: {error}); set it first")
            return
        if isinstance(value, torch.Tensor):  # first, because it is the usual case and the fastest test
            # In this order: a ShardedTensor, which is never whole, does not know is_nested.
            if self._is_whole(node) and value.is_nested:  # nothing can be copied into another raggedness
                self._replacer.replace(node, container, key, path)
            else:
                match_tensor(self._replacer, node, container, key, path, is_data=owner is Owner.NOBODY)
        elif type(value) is PerRank:
            self._per_rank(node, value, path)
        elif is_stateful(value):
            self._stateful(node, value, path)
        elif isinstance(value, (Mapping, list)) and self._replacer.is_matched(value) and not holds_belongings(value):
            self._replacer.replace(node, container, key, path, is_own=False)  # one container here, two values there
        elif isinstance(value, (Mapping, list, tuple)) and holds_state(value):
            self._replacer.note_matched(value)
            self._container_of_state(node, container, key, path, owner)
        elif isinstance(value, Mapping) and is_mapping(node) and not is_with_recipe(node):
            self._replacer.note_matched(value)
            self._mapping(node, value, path, self._owner_of(node, value, path, owner))
        elif isinstance(value, list) and is_list(node):
            self._replacer.note_matched(value)
            self._list(node, value, path, owner)
        elif value is None and (is_module_node(node) or _is_optimizer_node(node)):
            self._none_for_object(path)
        else:
            self._replacer.replace(node, container, key, path)

    def _entries(
        self,
        container: Any,
        names: Sequence[tuple[Any, Any]],
        nodes: Mapping[Any, Node],
        path: Path,
        owner: Owner,
        absent: Callable[[Any], None],
    ) -> None:
        """Match the entries of a container with the nodes that its checkpoint has.

        Args:
            names: of the entries: (key, name in the checkpoint).
            path: of the container.
            absent: called with each key that the checkpoint does not have, in its turn.
        """
        if type(container) not in PLAIN_CONTAINERS:  # reading its entries may run code of the user, or raise
            are_direct = [False] * len(names)
        else:
            there = [key for key, name in names if name in nodes]
            children = [nodes[name] for _, name in names if name in nodes]
            values = list(map(container.__getitem__, there))
            are_direct = self._direct.among(children, values)
            if len(there) == len(names) and all(are_direct):  # most
                self.plan.read_directly_into(children, values, [(*path, key) for key in there])
                return
        is_direct = iter(are_direct)
        for key, name in names:
            if name not in nodes:
                absent(key)
            elif next(is_direct):
                self.plan.read_directly_into([nodes[name]], [container[key]], [(*path, key)])
            else:
                self.entry(nodes[name], container, key, (*path, key), owner)

    def _none_for_object(self, path: Path) -> None:
        """Match None with the state of a module or optimizer, which would be of no use in its place."""
        if self._strict:
            self.plan.add_problem(
                path,
                "is None in the target, and the checkpoint has the state of an object for it; give the object, "
                "or leave the name out of into",
            )
        else:
            self._extras.note(path)

    def _container_of_state(self, node: Node, container: Any, key: Key, path: Path, owner: Owner) -> None:
        """Match a container that has in it what is to be restored in place."""
        value = container[key]
        if isinstance(value, Mapping) and is_mapping(node):
            self._mapping(node, value, path, self._owner_of(node, value, path, owner))
        elif isinstance(value, list) and is_list(node):
            self._list(node, value, path, owner)
        elif self._is_object(node):
            self._replacer.merge(node, container, key, path)
        elif self._strict or holds_belongings(value) or self._replacer.refusal(container, key) is not None:
            self.plan.add_problem(
                path, f"is a {type(value).__name__} in the target and {kind_of(node)} in the checkpoint"
            )
        else:
            self.plan.replaced += tensor_paths(value, path)
            self._replacer.replace(node, container, key, path)

    def _owner_of(self, node: Node, value: Mapping[Any, Any], path: Path, owner: Owner) -> Owner:
        if value and is_module_state(node, value):
            return Owner.MODULE
        if owner is Owner.OBJECT or (self._selection is not None and not self._selection.takes(path)):
            return Owner.OBJECT
        return Owner.NOBODY

    def _is_whole(self, node: Node) -> bool:
        """Whether a container was stored as one value: it is built anew."""
        return is_with_recipe(node) or self._is_object(node)

    def _is_object(self, node: Node) -> bool:
        return type(node) is int and self._items.kind_of(node).kind == "object"

    def _per_rank(self, node: Node, value: PerRank, path: Path) -> None:
        """Match this rank's value of a ``PerRank``. Where the checkpoint has none of this rank, the value stays."""
        key = rank_key(self._rank)
        nodes = children_of(node)
        ranks = nodes_of_ranks(node)
        if key in nodes:
            own = {key: value.value}
            self.entry(nodes[key], own, key, (*path, key))
            self.plan.then(path, lambda values: setattr(value, "value", own[key]))
        elif ranks:
            logger.warning(
                "%s: the checkpoint has no PerRank value of rank %d, so the rank keeps the value that it has",
                describe(path),
                self._rank,
            )
        else:
            self.plan.add_problem(path, f"is a PerRank in the target and {kind_of(node)} in the checkpoint")
        offer_values_of_others(self.plan, ranks, path, self._rank)

    def _mapping(self, node: Node, value: Mapping[Any, Any], path: Path, owner: Owner) -> None:
        """Match the entries of two mappings by name, and note the names that only one of them has.

        A plain dict whose names are those of a module's state is treated as one if the names differ: a dict takes new
        names, a module does not.
        """
        node = self._renaming.aligned(node, value)
        names, nodes = names_and_children(node, value)
        present = set(names.values())
        self._extras.know(path, present)
        lacks = not nodes.keys() >= present
        if (lacks or len(nodes) > len(present)) and owner is Owner.NOBODY and nodes:
            if looks_like_module_state(value) and any(is_tensor(child, self._items) for child in nodes.values()):
                owner = Owner.MODULE
        self._entries(
            value,
            in_one_order(names),
            nodes,
            path,
            owner,
            lambda key: self.one_sided.absent(value, key, (*path, key), owner),
        )
        for position, (name, child) in enumerate(nodes.items()):
            if name not in present:
                self.one_sided.extra_entry(node, position, child, value, (*path, name), owner)
        if lacks and nodes and present.isdisjoint(nodes):
            self.one_sided.check_unfit(nodes, value, path, owner)
        if owner is Owner.NOBODY and isinstance(value, (dict, OrderedDict)) and type(value) in PLAIN_CONTAINERS:
            self.one_sided.keep_order(node, value, path)

    def _list(self, node: Node, value: list[Any], path: Path, owner: Owner) -> None:
        """Match the elements of two lists by their numbers. The longer end of one is appended, dropped or missing."""
        children = node[1]
        num_both = min(len(children), len(value))
        there = {index: children[index] for index in range(num_both) if children[index] is not ABSENT}
        numbers = [(index, index) for index in range(num_both)]
        self._entries(
            value, numbers, there, path, owner, lambda index: self.one_sided.missing(value[index], (*path, index))
        )
        kept = []
        for index in range(num_both, len(value)):
            if owner is Owner.NOBODY and not holds_belongings(value[index]):
                self.plan.dropped += tensor_paths(value[index], (*path, index))
            else:
                self.one_sided.missing(value[index], (*path, index))
                kept.append(value[index])
        if len(kept) < len(value) - num_both:
            self.one_sided.at_the_end(path, lambda values: value.__setitem__(slice(num_both, None), kept))
        has_objects_only = bool(value) and all(map(is_stateful, value))
        for index in range(num_both, len(children)):
            child = children[index]
            if has_objects_only and is_mapping(child):
                self._extras.note((*path, index))
            else:
                if owner is not Owner.NOBODY:
                    self.plan.unexpected.append((*path, index))
                self._replacer.append(child, value, (*path, index))

    def _stateful(self, node: Node, value: Any, path: Path) -> None:
        """Match an object that restores itself by ``load_state_dict()``.

        The ``load_state_dict()`` of torch's modules and optimizers may be given the object's own tensors, so those that fit
        are read in place. Another class might clear its tensors first, so it gets new ones.
        """
        loader, arguments = type(value).load_state_dict, {}
        kind = type(value).__name__
        what = f"{kind}.load_state_dict()"
        if loader is not torch.nn.Module.load_state_dict and self._is_cut(node, path):
            self.plan.add_problem(
                path, f"is a {kind}, which can be restored only whole, and keys= selects a part of it"
            )
            return
        if is_per_rank(node):
            self.plan.add_problem(
                path, f"is a {kind} in the target and was saved as PerRank, one value for each rank; give PerRank(...)"
            )
            return
        if self._is_object(node):
            match_object_or_none(self.plan, node, value, path, strict=self._strict)
            return
        if has_sharded(value, path):
            state = state_of(value, path)
            if isinstance(state, Mapping) and is_mapping(node):
                self._mapping(node, state, path, Owner.OBJECT)
            else:
                kind = type(state).__name__
                self.plan.add_problem(
                    path, f"has a {kind} as its state in the target and {kind_of(node)} in the checkpoint"
                )
            self.plan.then(path, lambda values: value.load_state_dict(state), what)
            return
        if loader in TORCH_LOADERS:  # they take the values only; any other may want what torch.load returns
            node = without_flags(node)
        if loader is torch.nn.Module.load_state_dict:
            state = state_of(value, path)
            node = self._renaming.aligned(node, state)
            self._extras.know(path, state.keys())
            match_module(self.plan, self._items, self._direct, node, value, state, path, self.one_sided.missing)
            arguments = {} if self._strict and self._selection is None else {"strict": False}
            if self._strict and not self._is_alone and is_mapping(node):  # the rest is unexpected, or of other ranks
                node = _with_keys(node, state)
        elif loader is torch.optim.Optimizer.load_state_dict:
            match_optimizer(self.plan, self._items, self._direct, node, value, path)
        self.plan.want(node)

        def restore(values: Values) -> None:
            state = build(node, values.__getitem__, path)
            if loader is torch.optim.Optimizer.load_state_dict:
                fit_states(state, value)
            value.load_state_dict(state, **arguments)

        self.plan.then(path, restore, what)

    def _is_cut(self, node: Node, path: Path) -> bool:
        """Whether the selection leaves out something under ``path``."""
        if self._selection is None:
            return False
        whole = self.whole
        for key in path:
            whole = whole[1][key] if is_list(whole) else children_of(whole)[key]
        return bool(node != whole)


def _with_keys(node: Node, keys: Collection[Any]) -> Node:
    """Return a mapping's node with some of its keys only."""
    kept = [number for number, key in enumerate(node[1]) if key in keys or (node[0] == "mapping" and number == 0)]
    return [node[0], [node[1][number] for number in kept], [node[2][number] for number in kept], *node[3:]]


def _is_optimizer_node(node: Node) -> bool:
    return is_mapping(node) and children_of(node).keys() >= {"state", "param_groups"}
