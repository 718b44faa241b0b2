"""Matching objects with ``load_state_dict()`` where the checkpoint has something unusual: None, or a rank that is gone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from stager.loading.match_torch import listed
from stager.loading.nodes import children_of, is_mapping, state_of, tensors_of
from stager.loading.restore_plan import RestorePlan, Values
from stager.state.per_rank import rank_key
from stager.state.shards import is_sharded
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import Node, Path, describe, fqn

logger = logging.getLogger("stager")

TORCH_LOADERS = (torch.nn.Module.load_state_dict, torch.optim.Optimizer.load_state_dict)
"""The methods that may be given the object's own tensors."""

_RANK_KEY = re.compile(r"rank-([0-9]+)")


def nodes_of_ranks(node: Node) -> dict[int, Node]:
    """Return the nodes of a ``PerRank`` value by the rank that saved them."""
    children = children_of(node)
    return {int(found[1]): children[name] for name in children if (found := _RANK_KEY.fullmatch(str(name)))}


def is_per_rank(node: Node) -> bool:
    """Tell whether a node is that of a ``PerRank`` value."""
    return is_mapping(node) and 0 < len(nodes_of_ranks(node)) == len(children_of(node))


def offer_values_of_others(plan: RestorePlan, nodes: Mapping[int, Node], path: Path, rank: int) -> None:
    """Offer the values of ranks that this job does not have, each on one rank.

    Args:
        plan: is added to.
        nodes: of the value, by the rank that saved it.
        path: of the value.
        rank: this rank, which has its own value.
    """
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    left = sorted(other for other in nodes if other >= num_ranks and other != rank)
    if not left:
        return
    logger.warning(
        "%s: the checkpoint has PerRank values of ranks that this job of %d does not have (%s); nothing restores them. "
        "They are in Loaded.per_rank[%r], each on the rank that is its number modulo %d",
        *(describe(path), num_ranks, listed(left), fqn(path), num_ranks),
    )
    for other in left:
        if other % num_ranks == rank % num_ranks:
            at = (*path, rank_key(other))
            plan.want(nodes[other])
            plan.then(at, _offering(plan, fqn(path), other, nodes[other], at))


def _offering(plan: RestorePlan, name: str, rank: int, node: Node, path: Path) -> Callable[[Values], None]:
    def offer(values: Values) -> None:
        plan.per_rank.setdefault(name, {})[rank] = build(node, values.__getitem__, path)

    return offer


def match_object_or_none(plan: RestorePlan, node: int, value: Any, path: Path, *, strict: bool) -> None:
    """Match an object with one that was pickled. Where None was saved, there was no object then: it stays as it is."""
    kind, is_none = type(value).__name__, False
    is_torch = type(value).load_state_dict in TORCH_LOADERS

    def check(values: Values) -> str | None:
        nonlocal is_none
        is_none = values[node] is None and (is_torch or state_of(value, path) is not None)
        if is_none and strict:
            return (
                f"{describe(path)}: is a {kind} in the target and None in the checkpoint, which has no state for it; "
                "leave it out of into, or pass strict=False to leave it as it is"
            )
        if is_none:
            plan.missing.append(path)
        elif is_torch:
            what = "no optimizer" if isinstance(value, torch.optim.Optimizer) else "a single value"
            return f"{describe(path)}: is a {kind} in the target and {what} in the checkpoint"
        return None

    def restore(values: Values) -> None:
        if not is_none:
            value.load_state_dict(values[node])

    plan.want(node)
    plan.checks.append(check)
    plan.then(path, restore, f"{kind}.load_state_dict()")


def has_sharded(value: Any, path: Path) -> bool:
    """Whether an object with a ``load_state_dict()`` of its own has DTensors, which exist only in a process group."""
    if type(value).load_state_dict in TORCH_LOADERS or not (dist.is_available() and dist.is_initialized()):
        return False
    return any(map(is_sharded, tensors_of(state_of(value, path)).values()))
