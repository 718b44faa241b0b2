"""What a restore will do to the values that it restores into; complete before a byte of a tensor is read.

:mod:`stager.loading.match` fills the plan, :mod:`stager.loading.restore` carries it out.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stager.loading.loaded import Outcome
from stager.loading.one_memory import contradictions
from stager.loading.prefixes import PrefixFound, Shape, find_prefixes
from stager.loading.sharded import Sharded
from stager.loading.targets import Targets
from stager.state.shards import is_sharded
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.structure import Node, Path, describe, fqn, walk
from stager.workers.checkpoint.layout.tensor_node import without_flags
from stager.workers.errors import StateMismatchError, UnloadableError
from stager.workers.wording import first_of

logger = logging.getLogger("stager")

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
        targets: the tensors that receive items. Where they share memory, their values have to agree.
        sharded: tensors that lie on several ranks; each rank fills its own boxes.
        checks: run once objects are unpickled and before tensors are read. Each returns a problem, or None.
        steps: done in order once everything is read.
        missing: key paths of the target that the checkpoint does not have. They stay as they are.
        unexpected: key paths of the checkpoint that the target does not have, and that it does not get.
        ignored: names at the top of the checkpoint that the target does not ask for.
        dropped: tensors of the target that the checkpoint does not have, and that are removed from their containers.
        replaced: tensors of the target whose place new ones take, because they do not fit.
        problems: all other mismatches.
        unfit: values for which the checkpoint has something, and nothing of it fits: path, and a sentence.
        shapes: of tensors that only one side has.
        converted: key paths of tensors that get another dtype, the saved dtype, and that of the target.
        per_rank: values of ranks that this job does not have: by name, then by rank.
        cause: of a problem: what code of the user raised.
    """

    wanted: set[int] = field(default_factory=set)
    targets: Targets = field(default_factory=Targets)
    sharded: list[Sharded] = field(default_factory=list)
    checks: list[Callable[[Values], str | None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    unexpected: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    dropped: list[Path] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unfit: list[tuple[Path, str]] = field(default_factory=list)
    shapes: dict[Path, Shape] = field(default_factory=dict)
    per_rank: dict[str, dict[int, Any]] = field(default_factory=dict)
    converted: list[tuple[Path, torch.dtype, torch.dtype]] = field(default_factory=list)
    cause: Exception | None = None

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
            self.targets.add(index, tensor, path)

    def read_directly_into(
        self, indices: Sequence[int], tensors: Sequence[torch.Tensor], paths: Sequence[Path]
    ) -> None:
        """Read items into tensors that certainly take their bytes as they are."""
        self.wanted.update(indices)
        self.targets.add_all(indices, tensors, paths, is_direct=True)

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
            f"Correct the code that raised, or leave {describe(step.path[:1])} out of into",
        )

    def _how_far(self, number: int) -> str:
        done = [describe(step.path) for step in self.steps[:number]]
        left = [describe(step.path) for step in self.steps[number + 1 :]]
        in_place = " Tensors that are read in place are restored, all of them." if self.targets or self.sharded else ""
        return (
            f"{describe(self.steps[number].path)} may be restored in part. Restored before it: {_shown(done)}. "
            f"Not restored after it: {_shown(left)}.{in_place}"
        )

    def add_problem(self, path: Path, text: str) -> None:
        """Note a mismatch at ``path``; ``text`` is a predicate."""
        self.problems.append(f"{describe(path)}: {text}")

    def note_unexpected(self, path: Path, nodes: Mapping[Any, Node], names: Collection[Any], items: Items) -> None:
        """Note what a mapping of the checkpoint has, and the target, with these ``names``, has not."""
        for key, node in nodes.items():
            if key not in names:
                self.unexpected.append((*path, key))
                self.note_shape((*path, key), node, items)

    def note_shape(self, path: Path, node: Node, items: Items) -> None:
        """Note the shape of what only the checkpoint has, if it is a tensor."""
        node = without_flags(node)
        if type(node) is int and (kind := items.kind_of(node)).kind == "tensor":
            self.shapes[path] = kind.shape

    def refuse_mismatches(self, path: str, strict: bool) -> None:
        """Raise StateMismatchError if there is a problem, or, when ``strict``, a missing or unexpected key.

        Args:
            path: of the checkpoint, for the message.
        """
        prefixes = find_prefixes([*self.missing, *self.dropped], [*self.unexpected, *self.ignored], self.shapes)
        explained = {path[:-1] for one in prefixes for path in one.missing}
        unfit = {path: text for path, text in self.unfit if path not in explained}
        lines = [*self.problems, *unfit.values()]
        if strict or self.unfit:
            lines += [one.sentence for one in prefixes]
        if strict:
            lines += self._differences(prefixes, unfit)
        advice = "" if self.problems or self.unfit else "\nload(..., strict=False) restores the keys that both have"
        refuse(path, lines, advice, self.cause)

    def _differences(self, prefixes: Sequence[PrefixFound], unfit: Collection[Path]) -> Iterator[str]:
        """Iterate over a line for each key that is missing or unexpected, and does not differ by a prefix only.

        Args:
            unfit: paths of mappings whose keys were named already.
        """
        missing = frozenset[Path]().union(*(one.missing for one in prefixes))
        unexpected = frozenset[Path]().union(*(one.unexpected for one in prefixes))
        for path in self.missing:
            if path not in missing and path[:-1] not in unfit:
                yield f"{describe(path)}: is in the target but not in the checkpoint{self._near(path)}"
        for path in self.unexpected:
            if path not in unexpected and path[:-1] not in unfit:
                yield f"{describe(path)}: is in the checkpoint but not in the target"

    def _near(self, path: Path) -> str:
        """Say which names at the top the checkpoint has beside those of the target, and which was meant."""
        if len(path) > 1 or not self.ignored:
            return ""
        names = [str(name) for (name,) in self.ignored]
        near = difflib.get_close_matches(str(path[0]), names, n=1)
        return f", which also has {_shown(names)}" + (f"; did you mean {near[0]}?" if near else "")

    def refuse_failed_checks(self, path: str, values: Values) -> None:
        """Raise StateMismatchError if a check finds a problem with an unpickled object."""
        problems = [problem for check in self.checks if (problem := check(values)) is not None]
        refuse(path, problems, cause=self.cause)

    def refuse_contradictions(self, path: str, tensors: Mapping[int, torch.Tensor]) -> None:
        """Raise StateMismatchError if targets share memory and would get different values there.

        Args:
            tensors: loaded, by item; those of targets that share memory are among them, in memory of their own.
        """
        if tensors:  # none, in most states
            refuse(path, contradictions(self.targets, tensors))

    def outcome(self) -> Outcome:
        """Return what :class:`Loaded` says of a restore, and log what a user might not expect."""
        # A conversion that loses no bit changes nothing.
        if lossy := [one for one in self.converted if torch.promote_types(one[1], one[2]) != one[2]]:
            logger.warning(
                "values lost precision: %s saved as %s, and converted to %s, the dtype of into",
                _shown([describe(path) for path, _, _ in lossy]) + (" was" if len(lossy) == 1 else " were"),
                *(str(dtype).removeprefix("torch.") for dtype in lossy[0][1:]),
            )
        if self.dropped:
            names = _shown([describe(path) for path in self.dropped])
            logger.warning(
                "tensors of the target that the checkpoint does not have were removed from their containers: %s", names
            )
        if self.replaced:
            names = _shown([describe(path) for path in self.replaced])
            logger.warning(
                "tensors of the target did not fit what the checkpoint has, and what it has took their place: %s", names
            )
        return Outcome(
            tuple(map(fqn, [*self.missing, *self.dropped])),
            tuple(map(fqn, [*self.unexpected, *self.ignored])),
            tuple(map(fqn, self.replaced)),
            self.per_rank,
        )


def _shown(names: list[str]) -> str:
    return first_of(names, _SHOWN_NAMES) or "nothing"


def refuse(path: str, lines: list[str], advice: str = "", cause: Exception | None = None) -> None:
    """Raise StateMismatchError if there are any ``lines``; the first of them are shown."""
    if lines:
        shown = "\n  ".join(lines[:_SHOWN_PROBLEMS])
        more = f"\n  ... and {len(lines) - _SHOWN_PROBLEMS} more" if len(lines) > _SHOWN_PROBLEMS else ""
        raise StateMismatchError(
            f"{path} does not fit the target (what was given as into); nothing was changed:\n  {shown}{more}{advice}"
        ) from cause
