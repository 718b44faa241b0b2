"""Which names a rank's structure has: those of what it writes, and, on one rank, those of what it leaves to others, too.

Somebody has to name what is left to others, or nobody would miss what each rank left to another. Where all ranks have the
same names, rank 0 does, and its order of keys is that of the checkpoint. In what the others say, these names would cost
whoever commits more than all that is written. Where the ranks have not the same names (stages of a pipeline), each names
all of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Set
from operator import itemgetter
from typing import Any

from stager.workers.checkpoint.layout.structure import ABSENT, Node


def outline(structure: Node, private: Set[int]) -> str:
    """A digest of the names and containers of what the ranks have in common. In which order the keys are does not count.

    Args:
        private: leaves of which each rank has its own. They do not count, nor does what is empty.
    """
    text = json.dumps(_outline(structure, private), separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _outline(node: Node, private: Set[int]) -> Any:
    """None: there is nothing in it that counts."""
    if type(node) is int:
        return None if node in private else 0
    is_list = node[0] == "list"
    children = [_outline(child, private) for child in node[1 if is_list else 2]]
    keys = range(len(children)) if is_list else map(repr, node[1])  # which tells 1, True and "1" apart
    counting = [[key, child] for key, child in zip(keys, children, strict=True) if child is not None]
    return [node[0], sorted(counting, key=itemgetter(0)), *node[3:]] if counting else None


def name_all(node: Node, leaf: Callable[[int], Node]) -> Node:
    """
    Args:
        leaf: the node of what this rank writes of a leaf; ``ABSENT``: nothing.
    """
    if type(node) is int:
        return leaf(node)
    position = 1 if node[0] == "list" else 2
    return [*node[:position], [name_all(child, leaf) for child in node[position]], *node[position + 1 :]]


def name_written(structure: Node, leaf: Callable[[int], Node]) -> Node:
    """As :func:`name_all`, without what this rank does not write, and the containers in which there is nothing else. What is
    empty anyway stays, for another rank may have something else in its place."""
    written = _written(structure, leaf)
    return [structure[0], [], [], *structure[3:]] if written is ABSENT else written


def _written(node: Node, leaf: Callable[[int], Node]) -> Node:
    if type(node) is int:
        return leaf(node)
    is_list = node[0] == "list"
    children = [_written(child, leaf) for child in node[1 if is_list else 2]]
    if children and all(child is ABSENT for child in children):
        return ABSENT
    if is_list:  # positions count
        return ["list", children]
    there = [(key, child) for key, child in zip(node[1], children, strict=True) if child is not ABSENT]
    return [node[0], [key for key, _ in there], [child for _, child in there], *node[3:]]
