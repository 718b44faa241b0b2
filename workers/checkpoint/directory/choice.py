"""The checkpoint that a path means: it is one, or it is the directory of a run that has it."""

from __future__ import annotations

import os

from stager.workers.checkpoint.directory.run_directory import (
    checkpoint_name,
    committed_steps,
    is_checkpoint_directory,
    require_run_directory,
)
from stager.workers.errors import CheckpointNotFoundError, UsageError

_SHOWN_STEPS = 5


def choose_checkpoint(path: str, step: int | None) -> str:
    """Return the directory of the checkpoint. It is not verified.

    Args:
        path: of a checkpoint or of a run, absolute.
        step: which one of the run; None: the newest.

    Raises:
        CheckpointNotFoundError: ``path`` is no directory, or has no such checkpoint; says which there are.
        UsageError: ``path`` is a checkpoint, and ``step`` is given, too.
    """
    if is_checkpoint_directory(path):
        if step is not None:
            raise UsageError(f"{path} is one checkpoint; leave the step out, or give the directory of its run")
        return path
    return os.path.join(path, checkpoint_name(_step_of_run(require_run_directory(path), step)))


def _step_of_run(path: str, step: int | None) -> int:
    steps = committed_steps(path)
    if step is not None and step not in steps:
        there = f"there are {_named(steps)}" if steps else "there are no checkpoints"
        raise CheckpointNotFoundError(None, f"no checkpoint of step {step}; {there}", path)
    if not steps:
        raise CheckpointNotFoundError(None, "the directory has no committed checkpoint", path)
    return steps[0] if step is None else step


def _named(steps: list[int]) -> str:
    more = f" and {len(steps) - _SHOWN_STEPS} more" if len(steps) > _SHOWN_STEPS else ""
    return f"steps {', '.join(map(str, steps[:_SHOWN_STEPS]))}{more}"
