"""Matching a checkpoint with torch's modules and optimizers, whose ``load_state_dict()`` does the restoring.

It would find most mismatches itself, but only after it has overwritten some of the state. Here they are found before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch

from stager.loading.difference import difference, obstacle, shape_problem
from stager.loading.direct_targets import DirectTargets
from stager.loading.nodes import children_of, is_list, is_mapping, kind_of, state_of, tensors_of
from stager.loading.restore_plan import RestorePlan, Values
from stager.state.dtensors import is_dtensor
from stager.state.shards import is_sharded, shape_of, shard_of, views_of
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.items import ItemKind, Items
from stager.workers.checkpoint.layout.structure import Node, Path, describe, walk
from stager.workers.wording import first_of

_SHOWN_NAMES = 5


def match_module(
    plan: RestorePlan,
    items: Items,
    direct: DirectTargets,
    node: Node,
    module: torch.nn.Module,
    state: Mapping[Any, Any],
    path: Path,
    missing: Callable[[Any, Path], None],
) -> None:
    """Plan to read the tensors of a module in place.

    Args:
        plan: is added to.
        items: of the checkpoint.
        direct: tells which tensors need no more checks.
        node: of the module in the checkpoint.
        state: the module's ``state_dict()``.
        path: of the module in the target.
        missing: called with each value, and its path, that the checkpoint does not have.
    """
    if not is_mapping(node):
        plan.add_problem(path, f"is a {type(module).__name__} in the target and {kind_of(node)} in the checkpoint")
        return
    nodes = children_of(node)
    if state and nodes and state.keys().isdisjoint(nodes):
        plan.unfit.append((path, nothing_fits(path, state, nodes)))
    for name, value in state.items():
        if name not in nodes:
            missing(value, (*path, name))
    plan.note_unexpected(path, nodes, state, items)
    children, tensors = list(nodes.values()), list(map(state.get, nodes))
    for key, child, tensor, is_direct in zip(nodes, children, tensors, direct.among(children, tensors), strict=True):
        if is_direct:
            plan.read_directly_into([child], [cast(torch.Tensor, tensor)], [(*path, key)])
            continue
        if type(child) is not int or items.kind_of(child).kind != "tensor" or not isinstance(tensor, torch.Tensor):
            continue
        item = items.kind_of(child)
        if torch.nn.parameter.is_lazy(tensor):  # it has no shape until it is loaded
            continue
        if item.shape != shape_of(tensor):
            plan.add_problem((*path, key), shape_problem(item, tensor))
        elif (problem := obstacle(tensor)) is not None:
            plan.add_problem((*path, key), problem)
        elif (saved := dtype_of(item.dtype)) == tensor.dtype or is_sharded(tensor):
            plan.read_into(child, tensor, (*path, key))
        else:  # load_state_dict() converts it
            plan.converted.append(((*path, key), saved, tensor.dtype))


def nothing_fits(path: Path, here: Collection[Any], there: Collection[Any]) -> str:
    """Say that no name of the target is in the checkpoint, and no name of the checkpoint in the target."""
    name = describe(path)
    text = f"{name}: nothing fits: the target has the keys {listed(here)}; the checkpoint has the keys {listed(there)}"
    types = {str(key): type(key).__name__ for key in there}
    alike = next((key for key in here if types.get(str(key), type(key).__name__) != type(key).__name__), None)
    if alike is None:
        return f"{text}. Is this the object that was saved as {name}?"
    kinds = f"{type(alike).__name__} in the target, and {types[str(alike)]} in the checkpoint"
    return f"{text}; the key {alike} is of type {kinds}"


def listed(names: Collection[Any]) -> str:
    """Write down the first of some names."""
    return first_of(names, _SHOWN_NAMES)


def match_optimizer(
    plan: RestorePlan,
    items: Items,
    direct: DirectTargets,
    node: Node,
    optimizer: torch.optim.Optimizer,
    path: Path,
) -> None:
    """Plan to read the tensors of an optimizer's state in place. For the arguments see :func:`match_module`."""
    groups: Node = children_of(node).get("param_groups")
    if not is_list(groups) or not all(map(is_mapping, groups[1])):
        plan.add_problem(path, f"is a {type(optimizer).__name__} in the target and no optimizer in the checkpoint")
        return
    num_groups = len(optimizer.param_groups)
    if len(groups[1]) != num_groups:
        plan.add_problem(
            path, f"has {num_groups} parameter groups in the target and {len(groups[1])} in the checkpoint"
        )
        return
    for number, (saved, group) in enumerate(zip(groups[1], optimizer.param_groups, strict=True)):
        _match_parameter_group(plan, saved, group, (*path, "param_groups", number))
    if problem := _of_another_kind(optimizer, groups[1]):
        plan.add_problem(path, problem)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    existing = tensors_of(state_of(optimizer, path), path)
    leaves = list(walk(node, path))
    indices, tensors = [index for _, index in leaves], [existing.get(leaf) for leaf, _ in leaves]
    for (leaf, index), present, is_direct in zip(leaves, tensors, direct.among(indices, tensors), strict=True):
        if is_direct:
            plan.read_directly_into([index], [cast(torch.Tensor, present)], [leaf])
            continue
        item = items.kind_of(index)
        tensor = _new_sharded(parameters, leaf[len(path) :], item) if present is None else present
        if tensor is not None and item.kind == "tensor" and not (difference(item, tensor) or obstacle(tensor)):
            plan.read_into(index, tensor, leaf)


def fit_states(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Prepare a state that was read for ``optimizer.load_state_dict()``, which checks less and shards nothing.

    Raises:
        ValueError: its states belong to none of its parameters.
    """
    _check_states_have_parameters(state)
    _shard_states(state, optimizer)


def _check_states_have_parameters(state: Any) -> None:
    """Check that an optimizer's states are of parameters of its groups: torch takes others, too, and steps from zero.

    Raises:
        ValueError: none is; to be told with the key path.
    """
    groups, states = state.get("param_groups", ()), state.get("state", {})
    parameters = [parameter for group in groups for parameter in group.get("params", ())]
    if (
        parameters
        and states
        and states.keys().isdisjoint(parameters)
        and all(isinstance(v, Mapping) for v in states.values())
    ):
        raise ValueError(
            f"the checkpoint has states of {', '.join(map(repr, list(states)[:3]))}, and its groups the parameters "
            f"{', '.join(map(repr, parameters[:3]))}: none of them belong together"
        )


def _shard_states(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give each state that was read whole the sharding of its parameter, if that is a DTensor.

    States that are named, as ``get_state_dict()`` makes them, are read whole: which parameter has a name is known only
    when the groups have been read. torch's ``load_state_dict()`` would take them as they are, and the next step would fail.
    """
    states = state.get("state", {})
    for saved, group in zip(state.get("param_groups", ()), optimizer.param_groups, strict=False):
        for name, parameter in zip(saved.get("params", ()), group["params"], strict=False):
            values = states.get(name)
            if is_dtensor(parameter) and isinstance(values, dict):
                like = parameter.detach()
                values.update({key: _sharded_as(like, value, str(name)) for key, value in values.items()})


def _sharded_as(like: torch.Tensor, value: Any, name: str) -> Any:
    """Return a whole tensor as one that is spread over the ranks as ``like`` is, if it has its shape."""
    if not isinstance(value, torch.Tensor) or is_sharded(value) or tuple(value.shape) != shape_of(like):
        return value
    sharded = torch.empty_like(like, dtype=value.dtype)
    shard = shard_of(sharded, name)
    if shard is not None and shard.boxes:
        for box, view in zip(shard.boxes, views_of(sharded), strict=True):
            places = zip(box.offsets, box.lengths, strict=True)
            view.copy_(value[tuple(slice(start, start + length) for start, length in places)])
    return sharded


def _of_another_kind(optimizer: torch.optim.Optimizer, groups: Sequence[Node]) -> str:
    """Say that another class of optimizer was saved; "": it may be the same.

    Each of the two has settings then that the other does not know. Fewer on one side are another version of torch, or a
    scheduler's ``initial_lr``. torch would take such groups, and the next ``step()`` would raise KeyError.
    """
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        names = children_of(saved).keys()
        lacking = [name for name in optimizer.defaults if name not in names]
        unknown = [name for name in names if name not in group and name != "initial_lr"]
        if lacking and unknown:
            return (
                f"has the class {type(optimizer).__name__} in the target, and another class was saved: the groups in the "
                f"checkpoint have {listed(unknown)}, and not {listed(lacking)}. Make the optimizer that was saved, or leave "
                "it out of into"
            )
    return ""


def _match_parameter_group(plan: RestorePlan, node: Node, group: dict[str, Any], path: Path) -> None:
    params = children_of(node).get("params")
    if type(params) is not int:
        plan.add_problem(path, "has no list of parameters in the checkpoint")
        return

    def check(values: Values) -> str | None:
        numbers = values[params]
        if isinstance(numbers, list) and len(numbers) == len(group["params"]):
            return None
        count = len(numbers) if isinstance(numbers, list) else "no"
        return f"{describe(path)}: has {len(group['params'])} parameters in the target and {count} in the checkpoint"

    plan.checks.append(check)


def _new_sharded(parameters: list[torch.Tensor], path: Path, item: ItemKind) -> torch.Tensor | None:
    """A tensor for a leaf that a new optimizer does not have yet: sharded as its parameter, if that is a DTensor.

    Args:
        path: of the leaf in the optimizer's state: ``("state", number of the parameter, name)``.
    """
    if len(path) != 3 or path[0] != "state" or type(path[1]) is not int or not 0 <= path[1] < len(parameters):
        return None
    parameter = parameters[path[1]].detach()
    if item.kind != "tensor" or not is_dtensor(parameter) or tuple(parameter.shape) != item.shape:
        return None
    return torch.empty_like(parameter, dtype=dtype_of(item.dtype))
