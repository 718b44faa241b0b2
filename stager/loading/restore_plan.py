"""What a restore will do to the values that it restores into; complete before a byte of a tensor is read.

:mod:`stager.loading.match` fills the plan, :mod:`stager.loading.restore` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stager.loading.sharded import Sharded
from stager.state.shards import is_sharded
from stager.workers.checkpoint.layout.structure import Node, Path, describe, walk
from stager.workers.errors import StateMismatchError, UnloadableError

_SHOWN_PROBLEMS = 20
_SHOWN_NAMES = 5

Values = Mapping[int, Any]
"""Loaded values by item number."""


class Step(NamedTuple):
    """What is done with a value once everything is read.

    Attributes:
        path: of the value.
        run: does it; may run code of the user.
        what: is done, for messages.
    """

    path: Path
    run: Callable[[Values], None]
    what: str


@dataclass(slots=True)
class RestorePlan:
    """Which items are needed, where their bytes go, and what happens to the containers and objects.

    Attributes:
        wanted: items that have to be read.
        targets: (item, tensor that receives it), in the order of the walk. Where targets share memory, the last one wins.
        sharded: tensors that lie on several ranks; each rank fills its own boxes.
        checks: run once objects are unpickled and before tensors are read. Each returns a problem, or None.
        steps: done in order once everything is read.
        missing: keys of the target that the checkpoint does not have.
        unexpected: keys of the checkpoint that the target does not have.
        problems: all other mismatches.
    """

    wanted: set[int] = field(default_factory=set)
    targets: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    sharded: list[Sharded] = field(default_factory=list)
    checks: list[Callable[[Values], str | None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def want(self, node: Node) -> None:
        """Read every item under ``node``."""
        if type(node) is int:
            self.wanted.add(node)
        else:
            self.wanted.update(index for _, index in walk(node))

    def read_into(self, index: int, tensor: torch.Tensor, path: Path) -> None:
        """Read an item into ``tensor``, which it fits."""
        if is_sharded(tensor):
            self.sharded.append(Sharded(index, describe(path), tensor))
        else:
            self.targets.append((index, tensor))

    def then(self, path: Path, run: Callable[[Values], None], what: str = "putting it in its place") -> None:
        """Add a step, see :class:`Step`."""
        self.steps.append(Step(path, run, what))

    def apply(self, values: Values, path: str) -> None:
        """Do the steps.

        Args:
            path: of the checkpoint, for the message.

        Raises:
            UnloadableError: a step raised, whatever it was. If the code of the user raises CorruptCheckpointError, this
                checkpoint is not damaged.
        """
        for number, step in enumerate(self.steps):
            try:
                step.run(values)
            except Exception as error:  # noqa: BLE001  # the user's code may raise anything
                raise self._stopped(number, error, path) from (
                    error.__cause__ if isinstance(error, UnloadableError) else error
                )

    def _stopped(self, number: int, error: Exception, path: str) -> UnloadableError:
        step = self.steps[number]
        key_path, reason = describe(step.path), f"{step.what} raised {type(error).__name__}: {error}"
        if isinstance(error, UnloadableError):  # a container that could not be built
            key_path, reason = error.key_path, error.reason
        return UnloadableError(
            key_path,
            f"{reason}. The bytes in {path} are intact, and no older checkpoint was tried. {self._how_far(number)} "
            "Correct the code that raised, or leave the value out by load(keys=...)",
        )

    def _how_far(self, number: int) -> str:
        done = [describe(step.path) for step in self.steps[:number]]
        left = [describe(step.path) for step in self.steps[number + 1 :]]
        in_place = " Tensors that are read in place are restored, all of them." if self.targets or self.sharded else ""
        return (
            f"{describe(self.steps[number].path)} may be restored in part. Restored before it: {_shown(done)}. "
            f"Not restored: {_shown(left)}.{in_place}"
        )

    def add_problem(self, path: Path, text: str) -> None:
        """Note a mismatch at ``path``; ``text`` is a predicate."""
        self.problems.append(f"{describe(path)}: {text}")

    def refuse_mismatches(self, path: str, strict: bool) -> None:
        """Raise StateMismatchError if there is a problem, or, when ``strict``, a missing or unexpected key.

        Args:
            path: of the checkpoint, for the message.
        """
        lines = list(self.problems)
        if strict:
            lines += [f"{name}: is in the target but not in the checkpoint" for name in self.missing]
            lines += [f"{name}: is in the checkpoint but not in the target" for name in self.unexpected]
        refuse(path, lines, "" if self.problems else "\nload(..., strict=False) restores the keys that both have")

    def refuse_failed_checks(self, path: str, values: Values) -> None:
        """Raise StateMismatchError if a check finds a problem with an unpickled object."""
        refuse(path, [problem for check in self.checks if (problem := check(values)) is not None])


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return (", ".join(names[:_SHOWN_NAMES]) or "nothing") + more


def refuse(path: str, lines: list[str], advice: str = "") -> None:
    """Raise StateMismatchError if there are any ``lines``; the first of them are shown."""
    if lines:
        shown = "\n  ".join(lines[:_SHOWN_PROBLEMS])
        more = f"\n  ... and {len(lines) - _SHOWN_PROBLEMS} more" if len(lines) > _SHOWN_PROBLEMS else ""
        raise StateMismatchError(
            f"{path} does not fit the target (what was given as into); nothing was changed:\n  {shown}{more}{advice}"
        )
