"""Matching a checkpoint with the values to restore into: every mismatch is found before a byte of a tensor is read.

The structure of the checkpoint and the target are walked together, which makes a :class:`RestorePlan`. Whether an object of
the checkpoint fits can be told only when it is unpickled; that becomes a *check* of the plan.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist

from stager.loading.difference import difference, fits, object_difference, obstacle
from stager.loading.match_torch import match_module, match_optimizer
from stager.loading.nodes import (
    children_of,
    is_list,
    is_mapping,
    kind_of,
    names_and_children,
    state_of,
    tensors_of,
)
from stager.loading.restore_plan import RestorePlan, Values
from stager.loading.selection import Selection
from stager.loading.whole_object import differences, holds_state, restore
from stager.state.per_rank import PerRank, rank_key
from stager.state.shards import is_sharded
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import Key, Node, Path, describe, is_with_recipe, walk
from stager.workers.checkpoint.layout.tensor_node import without_flags

logger = logging.getLogger("stager")

_TORCH_LOADERS = (torch.nn.Module.load_state_dict, torch.optim.Optimizer.load_state_dict)
_RANK_KEY = re.compile(r"rank-[0-9]+")


def match(
    manifest: Manifest,
    path: str,
    target: MutableMapping[str, Any],
    strict: bool,
    selection: Selection | None = None,
    rank: int = 0,
) -> RestorePlan:
    """Plan a restore of a checkpoint into ``target``.

    Args:
        manifest: of the checkpoint.
        path: of the checkpoint, for messages.
        target: see :meth:`stager.loading.restore.Restorer.load_into`.
        strict: missing and unexpected keys are errors.
        selection: the part of the checkpoint, and of ``target``, to restore.
        rank: selects the values of ``PerRank``.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ.
    """
    matcher = _Matcher(manifest, strict, selection, rank)
    structure = manifest.layout.structure if selection is None else selection.of(manifest.layout.structure, path)
    names, nodes = names_and_children(structure, target)
    for key, name in in_one_order(names):
        if name in nodes:
            matcher.entry(nodes[name], target, key, (key,))
        else:
            matcher.missing(target[key], (key,))
    matcher.plan.refuse_mismatches(path, strict)
    return matcher.plan


def in_one_order(names: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Order the entries of a target, (key, its name in the checkpoint), for the calls of ``load_state_dict()``.

    Among several ranks by name, as ``dcp.load`` does: a ``load_state_dict()`` or ``state_dict()`` that runs a collective (of
    FSDP) would wait for ever for ranks that are at another entry, because their mapping has another order.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return sorted(names.items(), key=lambda entry: str(entry[1]))
    return list(names.items())


class _Matcher:
    def __init__(self, manifest: Manifest, strict: bool, selection: Selection | None, rank: int) -> None:
        self._rank = rank
        self._items = manifest.layout.items
        self._all = manifest.layout.structure
        self._strict = strict
        self._selection = selection
        self.plan = RestorePlan()

    def missing(self, value: Any, path: Path) -> None:
        """Note that ``value`` is in the target and not in the checkpoint."""
        if self._selection is None:
            self.plan.missing.append(describe(path))
        else:
            self.plan.missing += map(describe, self._selection.in_value(value, path))

    def entry(self, node: Node, container: Any, key: Key, path: Path) -> None:
        """Match ``container[key]`` with a node, and plan how it is restored."""
        value = container[key]
        if isinstance(value, torch.Tensor):  # first, because it is the usual case and the fastest test
            if self._is_whole(node) and value.is_nested:  # nothing can be copied into another raggedness
                self._replace(node, container, key, path)
            else:
                self._tensor(node, value, path)
        elif type(value) is PerRank:
            self._per_rank(node, value, path)
        elif is_stateful(value):
            self._stateful(node, value, path)
        elif isinstance(value, Mapping) and is_mapping(node):
            self._mapping(node, value, path)
        elif isinstance(value, list) and is_list(node):
            self._list(node, value, path)
        elif isinstance(container, (MutableMapping, list)) and self._is_whole(node) and not holds_state(value):
            self._replace(node, container, key, path)
        elif isinstance(value, (Mapping, list)) and self._is_object(node):
            self._whole_object(node, value, path)
        elif isinstance(value, Mapping) or (isinstance(value, list) and any(map(_is_container_or_tensor, value))):
            self.plan.add_problem(
                path, f"is a {type(value).__name__} in the target and {kind_of(node)} in the checkpoint"
            )
        elif isinstance(container, (MutableMapping, list)):
            self._replace(node, container, key, path)
        else:
            self.plan.add_problem(path, f"is in a {type(container).__name__}, which cannot be changed")

    def _is_whole(self, node: Node) -> bool:
        """Whether a container was stored as one value: it is built anew."""
        return is_with_recipe(node) or self._is_object(node)

    def _is_object(self, node: Node) -> bool:
        return type(node) is int and self._items[node].kind == "object"

    def _whole_object(self, node: int, value: Any, path: Path) -> None:
        """Match a container that was stored as one object: it can be compared when it is unpickled."""
        self.plan.want(node)
        self.plan.checks.append(lambda values: "\n".join(differences(values[node], value, path)) or None)
        self.plan.then(path, lambda values: restore(values[node], value))

    def _per_rank(self, node: Node, value: PerRank, path: Path) -> None:
        key = rank_key(self._rank)
        nodes = children_of(node)
        if key in nodes:
            own = {key: value.value}
            self.entry(nodes[key], own, key, (*path, key))
            self.plan.then(path, lambda values: setattr(value, "value", own[key]))
        elif any(isinstance(other, str) and _RANK_KEY.fullmatch(other) for other in nodes):
            logger.warning(
                "%s: the checkpoint has no PerRank value of rank %d, so the rank keeps the value that it has",
                describe(path),
                self._rank,
            )
        else:
            self.plan.add_problem(path, f"is a PerRank in the target and {kind_of(node)} in the checkpoint")

    def _replace(self, node: Node, container: Any, key: Key, path: Path) -> None:
        self.plan.want(node)
        self.plan.then(path, lambda values: container.__setitem__(key, build(node, values.__getitem__, path)))

    def _mapping(self, node: Node, value: Mapping[Any, Any], path: Path) -> None:
        names, nodes = names_and_children(node, value)
        for key, name in in_one_order(names):
            if name in nodes:
                self.entry(nodes[name], value, key, (*path, key))
            else:
                self.missing(value[key], (*path, key))
        present = set(names.values())
        for position, (name, child) in enumerate(nodes.items()):
            if name not in present:
                self.plan.unexpected.append(describe((*path, name)))
                if isinstance(value, MutableMapping):
                    self._add(node, position, child, value, (*path, name))

    def _add(self, node: Node, position: int, child: Node, mapping: MutableMapping[Any, Any], path: Path) -> None:
        """Plan to put an entry of the checkpoint into a mapping that lacks it."""
        self.plan.want(child)
        if node[0] != "mapping":
            self._replace(child, mapping, path[-1], path)
            return
        recipe = node[2][0]
        self.plan.want(recipe)

        def add(values: Values) -> None:
            _, keys = values[recipe]
            mapping[path[-1] if keys is None else keys[position]] = build(child, values.__getitem__, path)

        self.plan.then(path, add)

    def _list(self, node: Node, value: list[Any], path: Path) -> None:
        children = node[1]
        for index in range(min(len(children), len(value))):
            self.entry(children[index], value, index, (*path, index))
        for index in range(len(children), len(value)):
            self.missing(value[index], (*path, index))
        for index in range(len(value), len(children)):
            self.plan.unexpected.append(describe((*path, index)))
            self._append(children[index], value, (*path, index))

    def _append(self, node: Node, value: list[Any], path: Path) -> None:
        self.plan.want(node)
        self.plan.then(path, lambda values: value.append(build(node, values.__getitem__, path)))

    def _wrapper(self, node: Node, value: torch.Tensor, path: Path) -> None:
        """Match a tensor that is made of others: it is built anew, and copied into the target."""
        recipe = node[2][0]
        self.plan.want(node)

        def check(values: Values) -> str | None:
            shape = list(values[recipe][2])
            if shape == list(value.shape):
                return None
            return f"{describe(path)}: has shape {list(value.shape)} in the target and {shape} in the checkpoint"

        self.plan.checks.append(check)
        self.plan.then(path, lambda values: _copy(build(node, values.__getitem__, path), value))

    def _tensor(self, node: Node, value: torch.Tensor, path: Path) -> None:
        node = without_flags(node)  # the target's tensor stays what it is
        if isinstance(node, list) and node[0] == "wrapper":
            self._wrapper(node, value, path)
            return
        if type(node) is not int:
            self.plan.add_problem(path, f"is a tensor in the target and {kind_of(node)} in the checkpoint")
            return
        self.plan.want(node)
        if fits(self._items[node], value):
            self.plan.targets.append((node, value))
        elif self._items[node].kind == "object":  # perhaps a sparse or quantized tensor, which torch.save pickled
            self.plan.checks.append(lambda values: object_difference(values[node], value, path))
            self.plan.then(path, lambda values: _copy(values[node], value))
        elif (problem := difference(self._items[node], value) or obstacle(value)) is not None:
            self.plan.add_problem(path, problem)
        else:
            self.plan.read_into(node, value, path)

    def _stateful(self, node: Node, value: Any, path: Path) -> None:
        """Match an object that restores itself by ``load_state_dict()``.

        The ``load_state_dict()`` of torch's modules and optimizers may be given the object's own tensors, so those that fit
        are read in place. Another class might clear its tensors first, so it gets new ones.
        """
        loader, arguments = type(value).load_state_dict, {}
        what = f"{type(value).__name__}.load_state_dict()"
        if loader is not torch.nn.Module.load_state_dict and self._is_cut(node, path):
            kind = type(value).__name__
            self.plan.add_problem(
                path, f"is a {kind}, which can be restored only whole, and keys= selects a part of it"
            )
            return
        if _has_sharded(value, path):
            state = state_of(value, path)
            if isinstance(state, Mapping) and is_mapping(node):
                self._mapping(node, state, path)
            else:
                kind = type(state).__name__
                self.plan.add_problem(
                    path, f"has a {kind} as its state in the target and {kind_of(node)} in the checkpoint"
                )
            self.plan.then(path, lambda values: value.load_state_dict(state), what)
            return
        if loader in _TORCH_LOADERS:  # they take the values only; any other may want what torch.load returns
            node = without_flags(node)
        self.plan.want(node)
        if loader is torch.nn.Module.load_state_dict:
            match_module(self.plan, self._items, node, value, path, self.missing)
            arguments = {} if self._strict and self._selection is None else {"strict": False}
        elif loader is torch.optim.Optimizer.load_state_dict:
            match_optimizer(self.plan, self._items, node, value, path)

        def restore(values: Values) -> None:
            value.load_state_dict(build(node, values.__getitem__, path), **arguments)

        self.plan.then(path, restore, what)

    def _is_cut(self, node: Node, path: Path) -> bool:
        """Whether the selection leaves out some leaf under ``path``."""
        if self._selection is None:
            return False
        whole = self._all
        for key in path:
            whole = whole[1][key] if is_list(whole) else children_of(whole)[key]
        return len(list(walk(node, path))) != len(list(walk(whole, path)))


def _has_sharded(value: Any, path: Path) -> bool:
    """Whether an object with a ``load_state_dict()`` of its own has DTensors, which exist only in a process group."""
    if type(value).load_state_dict in _TORCH_LOADERS or not (dist.is_available() and dist.is_initialized()):
        return False
    return any(map(is_sharded, tensors_of(state_of(value, path)).values()))


def _copy(loaded: torch.Tensor, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(loaded)


def _is_container_or_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Mapping, list)) or is_stateful(value)
