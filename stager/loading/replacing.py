"""Putting what was saved in the place of a value of the target, or beside it.

A container of a class of its own may refuse: it is read-only, or frozen. It is asked before anything is changed, by giving
it what it has. If it refuses, its values have to be what the checkpoint has.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from stager.loading.belongings import is_owned_tensor
from stager.loading.merge import Merge, StandsFor, is_equal
from stager.loading.restore_plan import RestorePlan, Values
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.structure import Key, Node, Path, describe, walk

_ITS_ENTRIES = object()  # equal to no loaded value

PLAIN_CONTAINERS = (dict, OrderedDict, defaultdict, list)
"""Containers of these types take any value."""


class Replacer:
    """Plans what is put into the containers of a target.

    Args:
        plan: is added to.
        items: of the checkpoint.
        strict: a tensor of another shape or dtype is a problem.
    """

    def __init__(self, plan: RestorePlan, items: Items, *, strict: bool) -> None:
        self.plan = plan
        self.items = items
        self.strict = strict
        self._refusals: dict[
            int, Exception | None
        ] = {}  # by identity of a container: what it raised when it was changed
        self._stands_for: StandsFor = {}

    def note_matched(self, container: Any) -> None:
        """Note a container of the target whose entries are matched one by one. It can become one value only."""
        self._stands_for[id(container)] = container, _ITS_ENTRIES

    def is_matched(self, container: Any) -> bool:
        """Whether :meth:`note_matched` was told of it."""
        return id(container) in self._stands_for

    def replace(self, node: Node, container: Any, key: Key, path: Path, *, is_own: bool = True) -> None:
        """Put what was saved in the place of a value: into the value itself, if it is a container of the same type.

        Args:
            is_own: the value is in no other place of the target.
        """
        self.plan.want(node)
        refusal = self.refusal(container, key)
        if refusal is not None:
            self._compare_only(node, container, key, path, refusal)
            return

        def put_there(values: Values) -> None:
            loaded, present = build(node, values.__getitem__, path), container[key]
            if not is_own or _is_leaf(present):
                put(container, key, loaded)
            else:
                put(container, key, Merge(loaded, present, path, strict=False, stands_for=self._stands_for).apply())

        self.plan.then(path, put_there)

    def merge(self, node: int, container: Any, key: Key, path: Path) -> None:
        """Match a container with one that was stored as one object: they can be compared when it is unpickled."""
        merges: list[Merge] = []
        refusal = self.refusal(container, key)

        def check(values: Values) -> str | None:
            merge = Merge(values[node], container[key], path, strict=self.strict, stands_for=self._stands_for)
            merges.append(merge)
            self.plan.missing += merge.missing
            self.plan.dropped += merge.dropped
            self.plan.replaced += merge.replaced
            if self.strict:
                merge.problems += [f"{describe(at)}: is not in the checkpoint" for at in merge.missing]
            if refusal is not None and merge.result is not container[key]:
                merge.problems.append(self.refused(container, path, refusal))
            return "\n  ".join(merge.problems) or None

        self.plan.want(node)
        self.plan.checks.append(check)
        self.plan.then(path, lambda values: put(container, key, merges[-1].apply()))

    def add(self, node: Node, position: int, child: Node, mapping: MutableMapping[Any, Any], path: Path) -> None:
        """Plan to put an entry of the checkpoint into a mapping that lacks it."""
        self.plan.want(child)
        if node[0] != "mapping":
            self.plan.then(path, lambda values: put(mapping, path[-1], build(child, values.__getitem__, path)))
            return
        recipe = node[2][0]
        self.plan.want(recipe)

        def add(values: Values) -> None:
            _, keys = values[recipe]
            mapping[path[-1] if keys is None else keys[position]] = build(child, values.__getitem__, path)

        self.plan.then(path, add)

    def append(self, node: Node, value: list[Any], path: Path) -> None:
        """Plan to put an element of the checkpoint at the end of a list."""
        self.plan.want(node)
        self.plan.then(path, lambda values: value.append(build(node, values.__getitem__, path)))

    def refusal(self, container: Any, key: Key) -> Exception | None:
        """Why a container cannot be changed; None: it can. A class of its own is asked, by giving it what it has."""
        if type(container) in PLAIN_CONTAINERS:
            return None
        if id(container) not in self._refusals:
            self._refusals[id(container)] = _refusal_of(container, key)
        return self._refusals[id(container)]

    def refused(self, container: Any, path: Path, refusal: Exception) -> str:
        """Say that a value differs and cannot be changed, and note why as the cause of the error."""
        self.plan.cause = refusal
        first_line = str(refusal).partition("\n")[0]
        return (
            f"{describe(path)}: differs from the checkpoint, and is in a {type(container).__name__}, which cannot be "
            f"changed ({type(refusal).__name__}: {first_line}); leave it out of into, or make it writable"
        )

    def _compare_only(self, node: Node, container: Any, key: Key, path: Path, refusal: Exception) -> None:
        """Match a value that cannot be replaced: it has to be what the checkpoint has."""
        if any(self.items.kind_of(index).kind != "object" for _, index in walk(node)):
            self.plan.problems.append(self.refused(container, path, refusal))
            return

        def check(values: Values) -> str | None:
            loaded = build(node, values.__getitem__, path)
            return None if is_equal(loaded, container[key]) else self.refused(container, path, refusal)

        self.plan.checks.append(check)

    def may_replace_tensor(self, container: Any, key: Key) -> bool:
        """Whether another tensor may take the place of one of the target."""
        return not is_owned_tensor(container[key]) and self.refusal(container, key) is None


def put(container: Any, key: Any, value: Any) -> None:
    """Put a value into a container, unless it is there."""
    if isinstance(container, Mapping) and key not in container:
        container[key] = value  # type: ignore[index]  # what cannot be changed was found before
    elif container[key] is not value:
        container[key] = value


def _refusal_of(container: Any, key: Any) -> Exception | None:
    """Give a container what it has at a key, to see whether it can be changed. Returns what that raised."""
    try:
        container[key] = container[key]
    except Exception as error:  # noqa: BLE001  # the user's code may raise anything
        return error
    return None


def _is_leaf(value: Any) -> bool:
    """Whether a value is no container that can be emptied and filled."""
    return value is None or isinstance(value, (torch.Tensor, str, bytes, int, float))
