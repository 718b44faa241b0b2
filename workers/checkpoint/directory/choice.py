"""The checkpoint that a path means: it is one, or it is the directory of a run that has it."""

from __future__ import annotations

import os
from itertools import islice

from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.directory.run_directory import (
    checkpoint_names,
    is_checkpoint_directory,
    require_run_directory,
)
from stager.workers.errors import CheckpointNotFoundError, StagerError, UsageError
from stager.workers.wording import first_of

_SHOWN_STEPS = 5
_SHOWN_RUNS = 3
_LOOKED_AT = 1000  # names


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
    return os.path.join(path, _name_in_run(require_run_directory(path), step))


def _name_in_run(path: str, step: int | None) -> str:
    names = checkpoint_names(path)
    steps = list(names)
    if step is not None and step not in steps:
        there = f"there are {_named(steps)}" if steps else f"there are no checkpoints{runs_inside(path)}"
        raise CheckpointNotFoundError(None, f"no checkpoint of step {step}; {there}", path)
    if not steps:
        raise CheckpointNotFoundError(None, f"the directory has no committed checkpoint{runs_inside(path)}", path)
    return names[steps[0] if step is None else step]


def _named(steps: list[int]) -> str:
    return f"steps {first_of(steps, _SHOWN_STEPS)}"


def is_run(directory: str) -> bool:
    """Whether a directory is that of a run with a checkpoint."""
    return any(has_own_manifest(os.path.join(directory, name)) for name in checkpoint_names(directory).values())


def runs_inside(directory: str) -> str:
    """Say which runs a directory contains, for the end of a message that it has no checkpoint; "" if there are none.

    Args:
        directory: absolute.
    """
    try:
        with os.scandir(directory) as entries:
            runs = sorted(entry.name for entry in islice(entries, _LOOKED_AT) if entry.is_dir() and is_run(entry.path))
    except (OSError, StagerError):  # it only looks
        return ""
    if not runs:
        return ""
    named = f"the run{'s' * (len(runs) > 1)} {first_of(runs, _SHOWN_RUNS)}"
    return f"; it contains {named}: give the directory of one run, such as {os.path.join(directory, runs[0])}"
