"""Where a Loader finds checkpoints: in the directory of a run, or one checkpoint alone."""

from __future__ import annotations

import os

from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.run_directory import (
    CheckpointInfo,
    SkippedCheckpoint,
    committed_steps,
    is_checkpoint_directory,
    list_checkpoints,
    partial_names,
    path_of,
    read_checkpoint,
    read_checkpoint_at,
)
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.documents.names import REPLACED, number_in, parse_checkpoint, parse_partial
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CorruptCheckpointError, UsageError
from stager.workers.wording import first_of

_NUM_SHOWN = 3


class Run:
    """The checkpoints in the directory of a run, an absolute path."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint's directory, newest first."""
        return committed_steps(self.directory)

    def path(self, step: int) -> str:
        """Return the path of a step's checkpoint."""
        return path_of(self.directory, step)

    def has(self, step: int) -> bool:
        """Return whether something has the name of a step's checkpoint."""
        return storage_of(self.directory).exists(self.path(step))

    def read(self, step: int) -> tuple[CheckpointInfo, Manifest]:
        """Read the manifest of a step's checkpoint."""
        return read_checkpoint(self.directory, step)

    def listed(self) -> tuple[list[CheckpointInfo], list[SkippedCheckpoint]]:
        """Return the committed checkpoints, oldest first, and what was skipped."""
        return list_checkpoints(self.directory)

    def partial_names(self) -> list[str]:
        """Return the names of partial directories."""
        return partial_names(self.directory)

    def begun(self) -> set[int]:
        """Return the steps whose saves were begun and not committed, as far as their names tell."""
        partial = (name for name in self.partial_names() if not name.endswith(REPLACED))
        return {step for name in partial if (step := number_in(parse_partial(name)[0])) is not None}

    def which(self, missing: int) -> str:
        """Say that a step is missing, and which steps there are: those beside it, and the newest."""
        if not storage_of(self.directory).has_directory(self.directory):
            return f"does not exist, so there is no checkpoint of step {missing}; check the path"
        steps = self.steps()
        begun = missing in self.begun()
        why = f"there is no checkpoint of step {missing}"
        if begun:
            why += " (its save was not committed, or is still being written)"
        if not steps:
            return f"{why}, and no other one"
        if len(steps) <= _NUM_SHOWN:
            return f"{why}; there {'are' if len(steps) > 1 else 'is'} {_in_words(steps[::-1])}"
        beside = [
            max((s for s in steps if s < missing), default=None),
            min((s for s in steps if s > missing), default=None),
        ]
        near = [step for step in beside if step is not None]
        newest = steps[0]
        if newest in near:
            near.remove(newest)
        nearest = f"the nearest {'are' if len(near) > 1 else 'is'} {_in_words(near)}, " if near else ""
        return f"{why}; of {len(steps)}, {nearest}the newest is {newest}"

    def instead_of(self, damaged: list[int]) -> str:
        """Say what to do about steps that cannot be used, newest first."""
        if others := [step for step in self.steps() if step not in damaged]:
            return f"put it back from a copy, or load another step: {first_of(others, _NUM_SHOWN)}"
        if len(damaged) == 1:
            name = os.path.basename(self.path(damaged[0]))
            return f"the run has no other checkpoint: put this one back from a copy, or remove {name} to begin anew"
        return (
            f"none of the {len(damaged)} checkpoints of {self.directory} can be used (steps "
            f"{first_of(damaged, _NUM_SHOWN)}): put one back from a copy, or remove them all to begin anew"
        )


class OneCheckpoint(Run):
    """One checkpoint alone, by its path; it may have any name.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: its manifest cannot be read, and its name does not tell its step.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        named = parse_checkpoint(os.path.basename(path))
        self._step = read_manifest(path).header.step if named is None else named

    def steps(self) -> list[int]:
        """Return its step."""
        return [self._step]

    def path(self, step: int) -> str:
        """Return its path."""
        return self.directory

    def has(self, step: int) -> bool:
        """Return whether this is its step."""
        return step == self._step

    def read(self, step: int) -> tuple[CheckpointInfo, Manifest]:
        """Read its manifest."""
        return read_checkpoint_at(self.directory, step)

    def listed(self) -> tuple[list[CheckpointInfo], list[SkippedCheckpoint]]:
        """Return it, if its manifest can be read."""
        try:
            return [self.read(self._step)[0]], []
        except CorruptCheckpointError as error:
            return [], [SkippedCheckpoint(os.path.basename(self.directory), str(error))]

    def partial_names(self) -> list[str]:
        """Return nothing: what lies beside it is not looked at."""
        return []

    def instead_of(self, damaged: list[int]) -> str:
        """Say what to do about it."""
        return "put it back from a copy, or open its run and load another step"

    def which(self, missing: int) -> str:
        """Say which step it has."""
        return f"this is the checkpoint of step {self._step}, not of step {missing}; open its run for other steps"


def _in_words(steps: list[int]) -> str:
    """``step 3``, ``steps 3 and 5``, ``steps 1, 3 and 5``."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def place_of(directory: str, *, read_only: bool) -> Run:
    """Return where the checkpoints are. One checkpoint alone can only be read: a run would write its lock into it."""
    if not is_checkpoint_directory(directory):
        return Run(directory)
    if read_only:
        return OneCheckpoint(directory)
    run, name = os.path.split(directory)
    step = parse_checkpoint(name)
    its_run = "" if step is None else f"open its run, Checkpointer({run!r}), and load({step}); "
    raise UsageError(
        f"{directory} is one checkpoint, not the directory of a run; {its_run}to read this checkpoint alone, pass "
        "read_only=True, or call stager.load_checkpoint()"
    )
