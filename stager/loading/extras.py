"""Names that only one side has: what is told of them, and what other ranks have to say.

The ranks of a pipeline save names that no other rank has. So a name that a rank's target lacks is not unexpected if the
target of another rank has it. Whoever matches a mapping notes its names here; at the end, all ranks compare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from stager.loading.restore_plan import RestorePlan
from stager.workers.checkpoint.layout.structure import Path, fqn

OtherRanks = Callable[[Collection[str], Callable[[Collection[str]], set[str]]], set[str]]
"""Which of some names other ranks have. Every rank calls it once, with a function that tells which of names it has."""


def no_other_ranks(names: Collection[str], has: Callable[[Collection[str]], set[str]]) -> set[str]:
    """Stand for the other ranks of a process that loads for itself."""
    return set()


class _Extra(NamedTuple):
    """A name that the checkpoint has and the target has not.

    Attributes:
        path: of the value.
        add: plans to add it to the target; None: it cannot be added.
        is_unexpected: it is told, and an error if ``strict``.
    """

    path: Path
    add: Callable[[], None] | None
    is_unexpected: bool


class Extras:
    """The names of a checkpoint that the target lacks, and all names that the target has.

    Args:
        plan: is added to.
    """

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._extras: list[_Extra] = []
        self._names: list[tuple[Path, Collection[Any]]] = []  # what this rank has, by path of the mapping

    def know(self, path: Path, names: Collection[Any]) -> None:
        """Note the names that a mapping of the target has."""
        self._names.append((path, names))

    def note(self, path: Path, add: Callable[[], None] | None = None, *, is_unexpected: bool = True) -> None:
        """Note a name that the target lacks. For the arguments see :class:`_Extra`."""
        self._extras.append(_Extra(path, add, is_unexpected))

    def settle(self, other_ranks: OtherRanks) -> None:
        """Decide on all of them. A name that another rank has is neither unexpected here, nor added."""
        plan = self._plan
        paths = [*(extra.path for extra in self._extras), *plan.unexpected, *plan.ignored]
        elsewhere = other_ranks({fqn(path) for path in paths}, self._has)
        plan.unexpected = [path for path in plan.unexpected if fqn(path) not in elsewhere]
        plan.ignored = [path for path in plan.ignored if fqn(path) not in elsewhere]
        for extra in self._extras:
            if fqn(extra.path) not in elsewhere:
                if extra.is_unexpected:
                    plan.unexpected.append(extra.path)
                if extra.add is not None:
                    extra.add()

    def _has(self, names: Collection[str]) -> set[str]:
        return {name for path, keys in self._names for key in keys if (name := fqn((*path, key))) in names}
