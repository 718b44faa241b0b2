"""Matching a tensor of the target with what the checkpoint has at its place."""

from __future__ import annotations

from typing import Any

import torch

from stager.loading.belongings import is_module_node
from stager.loading.difference import difference, object_difference, obstacle
from stager.loading.nodes import kind_of
from stager.loading.replacing import Replacer, put
from stager.loading.restore_plan import Values
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import Key, Node, Path, describe
from stager.workers.checkpoint.layout.tensor_node import without_flags


def match_tensor(replacer: Replacer, node: Node, container: Any, key: Key, path: Path, *, is_data: bool) -> None:
    """Match the tensor ``container[key]`` with a node.

    Args:
        replacer: puts another value in the tensor's place.
        is_data: the container is data, so another value may take the tensor's place.
    """
    value, stored, plan = container[key], node, replacer.plan
    if type(node) is not int:
        node = without_flags(node)  # the target's tensor stays what it is
    if isinstance(node, list) and node[0] == "wrapper":
        _match_wrapper(replacer, node, value, path)
        return
    if type(node) is int and replacer.items.kind_of(node).kind == "object":
        # perhaps sparse or quantized, pickled by torch.save
        _match_object(replacer, node, container, key, path, is_data=is_data)
        return
    if type(node) is not int:
        saved = "the state dict of a module" if is_module_node(node) else kind_of(node)
        problem: str | None = f"is a tensor in the target and {saved} in the checkpoint"
    else:
        problem = difference(replacer.items.kind_of(node), value)
    if problem is None:
        if (hindrance := obstacle(value)) is not None:
            plan.add_problem(path, hindrance)
        else:
            plan.want(node)
            plan.read_into(node, value, path)
    elif not is_data or not replacer.may_replace_tensor(container, key):
        plan.add_problem(path, problem)
    elif replacer.strict:
        give = "give the module; " if is_module_node(node) else ""
        plan.add_problem(path, f"{problem}; {give}strict=False puts what was saved in the place of the tensor")
    else:
        plan.replaced.append(path)
        replacer.replace(stored, container, key, path)


def _match_wrapper(replacer: Replacer, node: Node, value: torch.Tensor, path: Path) -> None:
    """Match a tensor that is made of others: it is built anew, and copied into the target."""
    recipe, plan = node[2][0], replacer.plan
    plan.want(node)

    def check(values: Values) -> str | None:
        shape = list(values[recipe][2])
        if shape == list(value.shape):
            return None
        return f"{describe(path)}: has shape {list(value.shape)} in the target and {shape} in the checkpoint"

    plan.checks.append(check)
    plan.then(path, lambda values: _copy(build(node, values.__getitem__, path), value))


def _match_object(replacer: Replacer, node: int, container: Any, key: Key, path: Path, *, is_data: bool) -> None:
    """Match a tensor with a pickled object: most often a tensor, too. None takes its place: there was no tensor yet."""
    value, plan = container[key], replacer.plan
    may_replace = is_data and replacer.may_replace_tensor(container, key)
    replaces = False

    def check(values: Values) -> str | None:
        nonlocal replaces
        problem = object_difference(values[node], value, path)
        replaces = problem is not None and may_replace and (values[node] is None or not replacer.strict)
        if replaces:
            plan.replaced.append(path)
        return None if replaces else problem

    def restore(values: Values) -> None:
        if replaces:
            put(container, key, values[node])
        else:
            _copy(values[node], value)

    plan.want(node)
    plan.checks.append(check)
    plan.then(path, restore)


def _copy(loaded: torch.Tensor, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(loaded)
