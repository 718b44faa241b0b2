"""Which bytes of a checkpoint go where in values that are there already; every mismatch is found before a byte is read.

The structure of the checkpoint and the target are walked together. What can only be told from an unpickled object
(is it a tensor?) becomes a *check*, run once the objects are read and before the first tensor is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from stager.loading.difference import difference, fits, object_difference, obstacle, shape_problem
from stager.loading.selection import Selection
from stager.loading.sharded import Sharded
from stager.state.flatten import is_stateful
from stager.state.per_rank import PerRank, rank_key
from stager.state.shards import is_sharded
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import Item
from stager.workers.checkpoint.layout.structure import Key, Node, Path, build, describe, fqn, walk
from stager.workers.errors import StateMismatchError

logger = logging.getLogger("stager")

_SHOWN_PROBLEMS = 20
_RANK_KEY = re.compile(r"rank-[0-9]+")

Values = Mapping[int, Any]  # by item


@dataclass(slots=True)
class Match:
    """What matching found out.

    Attributes:
        wanted: items that are needed at all.
        targets: (item, tensor that is to hold it), in the order of the walk; the last one wins where memory is shared.
        sharded: DTensors, of which this rank holds a part.
        checks: what is wrong with an unpickled object, or None.
        steps: what to do once everything is read, in order.
        missing, unexpected, problems: for the error.
    """

    wanted: set[int] = field(default_factory=set)
    targets: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    sharded: list[Sharded] = field(default_factory=list)
    checks: list[Callable[[Values], str | None]] = field(default_factory=list)
    steps: list[Callable[[Values], None]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match(
    manifest: Manifest,
    path: str,
    target: MutableMapping[str, Any],
    strict: bool,
    selection: Selection | None = None,
    rank: int = 0,
) -> Match:
    """
    Args:
        manifest, path: of the checkpoint.
        target: see :meth:`stager.loading.restore.Restorer.load_into`.
        strict: missing and unexpected keys are errors.
        selection: only this part of the checkpoint, and of ``target``.
        rank: whose values those of ``PerRank`` are.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ.
    """
    matcher = _Matcher(manifest, strict, selection, rank)
    structure = manifest.layout.structure if selection is None else selection.of(manifest.layout.structure, path)
    nodes = dict(zip(structure[1], structure[2], strict=True))
    for name in target:
        if name in nodes:
            matcher.entry(nodes[name], target, name, (name,))
        else:
            matcher.missing(target[name], (name,))
    found = matcher.found
    lines = list(found.problems)
    if strict:
        lines += [f"{name}: missing in the checkpoint" for name in found.missing]
        lines += [f"{name}: in the checkpoint, but not here" for name in found.unexpected]
    refuse(path, lines, "" if found.problems else "\nload(..., strict=False) loads what fits")
    return found


def refuse(path: str, lines: list[str], advice: str = "") -> None:
    """Raise StateMismatchError if there are any ``lines``."""
    if lines:
        shown = "\n  ".join(lines[:_SHOWN_PROBLEMS])
        more = f"\n  ... and {len(lines) - _SHOWN_PROBLEMS} more" if len(lines) > _SHOWN_PROBLEMS else ""
        raise StateMismatchError(f"{path} does not fit; nothing was changed:\n  {shown}{more}{advice}")


class _Matcher:
    def __init__(self, manifest: Manifest, strict: bool, selection: Selection | None, rank: int) -> None:
        self._rank = rank
        self._items = manifest.layout.items
        self._all = manifest.layout.structure
        self._strict = strict
        self._selection = selection
        self.found = Match()

    def missing(self, value: Any, path: Path) -> None:
        """The checkpoint does not have ``value``."""
        if self._selection is None:
            self.found.missing.append(describe(path))
        else:
            self.found.missing += map(describe, self._selection.in_value(value, path))

    def entry(self, node: Node, container: Any, key: Key, path: Path) -> None:
        """Match ``container[key]`` with a node, and plan what becomes of it."""
        value = container[key]
        if isinstance(value, torch.Tensor):  # nearly every value, and the others take longer to ask for
            self._tensor(node, value, path)
        elif type(value) is PerRank:
            self._per_rank(node, value, path)
        elif is_stateful(value):
            self._stateful(node, value, path)
        elif isinstance(value, Mapping) and _is_mapping(node):
            self._mapping(node, value, path)
        elif isinstance(value, list) and _is_list(node):
            self._list(node, value, path)
        elif isinstance(value, Mapping) or (isinstance(value, list) and any(map(_is_container_or_tensor, value))):
            self._problem(path, f"is a {type(value).__name__} here and {_what(node)} in the checkpoint")
        elif isinstance(container, (MutableMapping, list)):
            self._replace(node, container, key)
        else:
            self._problem(path, f"its container {type(container).__name__} cannot be changed")

    def _per_rank(self, node: Node, value: PerRank, path: Path) -> None:
        key = rank_key(self._rank)
        nodes = dict(zip(node[1], node[2], strict=True)) if _is_mapping(node) else {}
        if key in nodes:
            own = {key: value.value}
            self.entry(nodes[key], own, key, (*path, key))
            self.found.steps.append(lambda values: setattr(value, "value", own[key]))
        elif any(isinstance(other, str) and _RANK_KEY.fullmatch(other) for other in nodes):
            logger.warning("%s: the checkpoint has none of rank %d, which keeps its own", describe(path), self._rank)
        else:
            self._problem(path, f"is PerRank here, and was not when it was saved: {_what(node)} in the checkpoint")

    def _replace(self, node: Node, container: Any, key: Key) -> None:
        self._want(node)
        self.found.steps.append(lambda values: container.__setitem__(key, build(node, values.__getitem__)))

    def _whole(self, node: Node, value: Any, path: Path) -> None:
        """As ``entry``, of a state that is in no container."""
        if isinstance(value, Mapping) and _is_mapping(node):
            self._mapping(node, value, path)
        else:
            self._problem(path, f"has a {type(value).__name__} as its state here, the checkpoint {_what(node)}")

    def _mapping(self, node: Node, value: Mapping[Any, Any], path: Path) -> None:
        nodes = dict(zip(node[1], node[2], strict=True))
        for key in value:
            if key in nodes:
                self.entry(nodes[key], value, key, (*path, key))
            else:
                self.missing(value[key], (*path, key))
        for key, child in nodes.items():
            if key not in value:
                self.found.unexpected.append(describe((*path, key)))
                if isinstance(value, MutableMapping):
                    self._replace(child, value, key)

    def _list(self, node: Node, value: list[Any], path: Path) -> None:
        children = node[1]
        for index in range(min(len(children), len(value))):
            self.entry(children[index], value, index, (*path, index))
        for index in range(len(children), len(value)):
            self.missing(value[index], (*path, index))
        for index in range(len(value), len(children)):
            self.found.unexpected.append(describe((*path, index)))
            self._append(children[index], value)

    def _append(self, node: Node, value: list[Any]) -> None:
        self._want(node)
        self.found.steps.append(lambda values: value.append(build(node, values.__getitem__)))

    def _tensor(self, node: Node, value: torch.Tensor, path: Path) -> None:
        if type(node) is not int:
            self._problem(path, f"is a tensor here and {_what(node)} in the checkpoint")
            return
        self._want(node)
        if fits(self._items[node], value):
            self.found.targets.append((node, value))
        elif self._items[node].kind == "object":  # a sparse or quantized tensor, perhaps
            self.found.checks.append(lambda values: object_difference(values[node], value, path))
            self.found.steps.append(lambda values: _copy(values[node], value))
        elif (problem := difference(self._items[node], value) or obstacle(value)) is not None:
            self._problem(path, problem)
        else:
            self._target(node, value, path)

    def _stateful(self, node: Node, value: Any, path: Path) -> None:
        """The object takes its state by ``load_state_dict()``. torch's own is known to copy a tensor onto itself, so there
        the tensors that fit are read in place; another might clear them first."""
        loader, arguments = type(value).load_state_dict, {}
        if loader is not torch.nn.Module.load_state_dict and self._is_cut(node, path):
            self._problem(path, f"{type(value).__name__} takes all of its state, and the keys select some of it")
            return
        if _has_sharded(value):
            here = value.state_dict()
            self._whole(node, here, path)
            self.found.steps.append(lambda values: value.load_state_dict(here))
            return
        self._want(node)
        if loader is torch.nn.Module.load_state_dict:
            self._module(node, value, path)
            arguments = {} if self._strict and self._selection is None else {"strict": False}
        elif loader is torch.optim.Optimizer.load_state_dict:
            self._optimizer(node, value, path)
        self.found.steps.append(lambda values: value.load_state_dict(build(node, values.__getitem__), **arguments))

    def _module(self, node: Node, module: torch.nn.Module, path: Path) -> None:
        """What ``load_state_dict`` would complain about, before anything is overwritten."""
        if not _is_mapping(node):
            self._problem(path, f"is a {type(module).__name__} here and {_what(node)} in the checkpoint")
            return
        nodes, here = dict(zip(node[1], node[2], strict=True)), module.state_dict()
        for key in here:
            if key not in nodes:
                self.missing(here[key], (*path, key))
        self.found.unexpected += [describe((*path, key)) for key in nodes if key not in here]
        for key, child in nodes.items():
            tensor = here.get(key)
            if type(child) is not int or self._items[child].kind != "tensor" or not isinstance(tensor, torch.Tensor):
                continue
            item = self._items[child]
            if torch.nn.parameter.is_lazy(tensor):  # it has no shape until it is loaded
                continue
            if item.shape != tuple(tensor.shape):
                self._problem((*path, key), shape_problem(item, tensor))
            elif (problem := obstacle(tensor)) is not None:
                self._problem((*path, key), problem)
            elif dtype_of(item.dtype) == tensor.dtype or is_sharded(tensor):  # else it is converted, as torch does
                self._target(child, tensor, (*path, key))

    def _optimizer(self, node: Node, optimizer: torch.optim.Optimizer, path: Path) -> None:
        """Groups of another number or size are refused by the optimizer, but by then its state is overwritten."""
        groups = dict(zip(node[1], node[2], strict=True)).get("param_groups") if _is_mapping(node) else None
        if groups is None or not _is_list(groups) or not all(map(_is_mapping, groups[1])):
            self._problem(path, f"is a {type(optimizer).__name__} here, and none in the checkpoint")
            return
        if len(groups[1]) != len(optimizer.param_groups):
            self._problem(path, f"has {len(optimizer.param_groups)} parameter groups, the checkpoint {len(groups[1])}")
            return
        for number, (there, here) in enumerate(zip(groups[1], optimizer.param_groups, strict=True)):
            self._parameter_group(there, here, (*path, "param_groups", number))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        existing: dict[Path, torch.Tensor] = {}
        _collect_tensors(optimizer.state_dict(), path, existing)
        for leaf, index in walk(node, path):
            item = self._items[index]
            tensor = existing.get(leaf)
            if tensor is None:
                tensor = _new_sharded(parameters, leaf[len(path) :], item)
            if tensor is not None and item.kind == "tensor" and not (difference(item, tensor) or obstacle(tensor)):
                self._target(index, tensor, leaf)

    def _parameter_group(self, node: Node, group: dict[str, Any], path: Path) -> None:
        params = dict(zip(node[1], node[2], strict=True)).get("params")
        if type(params) is not int:
            self._problem(path, "has no list of parameters in the checkpoint")
            return

        def check(values: Values) -> str | None:
            numbers = values[params]
            if isinstance(numbers, list) and len(numbers) == len(group["params"]):
                return None
            count = len(numbers) if isinstance(numbers, list) else "no"
            return f"{describe(path)}: has {len(group['params'])} parameters, the checkpoint {count}"

        self.found.checks.append(check)

    def _is_cut(self, node: Node, path: Path) -> bool:
        """Whether the selection leaves out some of what is at ``path``."""
        if self._selection is None:
            return False
        whole = self._all
        for key in path:
            whole = whole[1][key] if whole[0] == "list" else dict(zip(whole[1], whole[2], strict=True))[key]
        return len(list(walk(node, path))) != len(list(walk(whole, path)))

    def _target(self, index: int, tensor: torch.Tensor, path: Path) -> None:
        if is_sharded(tensor):
            self.found.sharded.append(Sharded(index, fqn(path), tensor))
        else:
            self.found.targets.append((index, tensor))

    def _want(self, node: Node) -> None:
        if type(node) is int:
            self.found.wanted.add(node)
        else:
            self.found.wanted.update(index for _, index in walk(node))

    def _problem(self, path: Path, text: str) -> None:
        self.found.problems.append(f"{describe(path)}: {text}")


def _new_sharded(parameters: list[torch.Tensor], path: Path, item: Item) -> torch.Tensor | None:
    """For an optimizer that has no state yet: what belongs to a parameter that is a DTensor is spread as it is.

    Args:
        path: of a leaf in the optimizer's state: ``("state", number of the parameter, name)``.
    """
    if len(path) != 3 or path[0] != "state" or type(path[1]) is not int or not 0 <= path[1] < len(parameters):
        return None
    parameter = parameters[path[1]].detach()
    if item.kind != "tensor" or not is_sharded(parameter) or tuple(parameter.shape) != item.shape:
        return None
    return torch.empty_like(parameter, dtype=dtype_of(item.dtype))


def _has_sharded(value: Any) -> bool:
    """Whether a stateful object, not one of torch's own, has DTensors: asked for where they can exist."""
    own = torch.nn.Module.load_state_dict, torch.optim.Optimizer.load_state_dict
    if type(value).load_state_dict in own or not (dist.is_available() and dist.is_initialized()):
        return False
    found: dict[Path, torch.Tensor] = {}
    _collect_tensors(value.state_dict(), (), found)
    return any(map(is_sharded, found.values()))


def _copy(loaded: torch.Tensor, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(loaded)


def _is_mapping(node: Node) -> bool:
    return type(node) is not int and node[0] in ("dict", "odict")


def _is_list(node: Node) -> bool:
    return type(node) is not int and node[0] == "list"


def _what(node: Node) -> str:
    if type(node) is int:
        return "a single value"
    return "a list" if node[0] == "list" else "a mapping"


def _is_container_or_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Mapping, list)) or is_stateful(value)


def _collect_tensors(value: Any, path: Path, found: dict[Path, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            _collect_tensors(child, (*path, key), found)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _collect_tensors(child, (*path, index), found)
