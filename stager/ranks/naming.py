"""Which names a rank's structure has: the leaves that it writes, and, on rank 0, those that it leaves to other ranks.

Rank 0 lists every leaf; otherwise a leaf that each rank left to another would vanish unnoticed. Its order of keys is that of
the checkpoint. The other ranks list only the leaves that they write: more names would cost the committing worker more time
than all the rest of a commit.

Where the ranks do not have the same names (stages of a pipeline), each rank lists all of its own leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from operator import itemgetter
from typing import Any

from stager.ranks.agreement import hash_of
from stager.workers.checkpoint.layout.structure import ABSENT, Node, map_leaves
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node, open_tensor


def outline(structure: Node, private: Set[int]) -> str:
    """A digest of the names and containers that the ranks have in common.

    The order of keys does not count, nor do empty containers and the leaves in ``PerRank`` (``private``).
    """
    text = json.dumps(_outline(structure, private), separators=(",", ":"), sort_keys=True)
    return hash_of(text.encode())


def _outline(node: Node, private: Set[int]) -> Any:
    """The node without what does not count; None if nothing in it counts."""
    if is_tensor_node(node):  # that one rank freezes a parameter, and another does not, is no other name
        node = open_tensor(node).node
    if type(node) is int:
        return None if node in private else 0
    is_list = node[0] == "list"
    children = [_outline(child, private) for child in node[1 if is_list else 2]]
    keys = range(len(children)) if is_list else map(repr, node[1])  # which tells 1, True and "1" apart
    counting = [[key, child] for key, child in zip(keys, children, strict=True) if child is not None]
    return [node[0], sorted(counting, key=itemgetter(0)), *node[3:]] if counting else None


def name_all(node: Node, leaf: Callable[[Any], Node]) -> Node:
    """The structure with every name. ``leaf`` returns the node of what this rank writes of a leaf, or ``ABSENT``."""
    if type(node) is int:
        return leaf(node)
    if is_tensor_node(node):
        return map_leaves(node, leaf)
    position = 1 if node[0] == "list" else 2
    return [*node[:position], [name_all(child, leaf) for child in node[position]], *node[position + 1 :]]


def name_written(structure: Node, leaf: Callable[[Any], Node]) -> Node:
    """The structure without the leaves that this rank does not write, and without containers that hold nothing else.

    An empty container stays, because another rank may have something else in its place. ``leaf``: as for :func:`name_all`.
    """
    written = _written(structure, leaf)
    return [structure[0], [], [], *structure[3:]] if written is ABSENT else written


def _written(node: Node, leaf: Callable[[Any], Node]) -> Node:
    if type(node) is int:
        return leaf(node)
    if is_tensor_node(node):
        return map_leaves(node, leaf)
    is_list = node[0] == "list"
    children = [_written(child, leaf) for child in node[1 if is_list else 2]]
    if children and all(child is ABSENT for child in children):
        return ABSENT
    if is_list:  # positions count
        return ["list", children]
    there = [(key, child) for key, child in zip(node[1], children, strict=True) if child is not ABSENT]
    return [node[0], [key for key, _ in there], [child for _, child in there], *node[3:]]
