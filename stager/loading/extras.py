"""Names that only one side has: what is told of them, and what other ranks have to say.

The ranks of a pipeline save names that no other rank has. So a name that a rank's target lacks is not unexpected if the
target of another rank has it. Whoever matches a mapping notes its names here; at the end, all ranks compare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from stager.loading.restore_plan import RestorePlan
from stager.workers.checkpoint.layout.structure import Path, fqn


class KnownNames(Protocol):
    """The names that a rank's target has."""

    def among(self, names: Collection[str]) -> set[str]:
        """Return which of some names the target has."""

    def all(self) -> set[str]:
        """Return every name."""


class OtherRanks:
    """The other ranks that load the same checkpoint into something. This class stands for none: a process loads for itself.

    Every rank calls each method once, in the order of this class.
    """

    def which_have(self, names: Collection[str], own: KnownNames, unexpected: Collection[str]) -> set[str]:
        """Return which of some names the target of another rank has.

        Args:
            names: that this rank's target does not have.
            own: the names that it has.
            unexpected: those of ``names`` that are an error if loading is strict.
        """
        return set()

    def wait_until_it_fits_all(self) -> None:
        """Return when every rank has found that the checkpoint fits. Nothing was changed on any of them until then."""


NO_OTHER_RANKS = OtherRanks()


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
        unexpected = [*(extra.path for extra in self._extras if extra.is_unexpected), *plan.unexpected]
        elsewhere = other_ranks.which_have({fqn(path) for path in paths}, self, set(map(fqn, unexpected)))
        plan.unexpected = [path for path in plan.unexpected if fqn(path) not in elsewhere]
        plan.ignored = [path for path in plan.ignored if fqn(path) not in elsewhere]
        for extra in self._extras:
            if fqn(extra.path) not in elsewhere:
                if extra.is_unexpected:
                    plan.unexpected.append(extra.path)
                if extra.add is not None:
                    extra.add()

    def among(self, names: Collection[str]) -> set[str]:
        """Return which of some names the target has."""
        return {name for path, keys in self._names for key in keys if (name := fqn((*path, key))) in names}

    def all(self) -> set[str]:
        """Return every name of the target."""
        return {fqn((*path, key)) for path, keys in self._names for key in keys}
