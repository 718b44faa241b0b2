"""Selecting the checkpoint that a command line means: ``PATH`` is a checkpoint, or the directory of a run."""

from __future__ import annotations

import os


def is_checkpoint(path: str) -> bool:
    """Tell whether a path is a checkpoint: by its name, or, if it was renamed, because it has a manifest."""
    from stager.workers.checkpoint.directory.run_directory import is_checkpoint_directory

    return is_checkpoint_directory(path)


def select_checkpoints(path: str, step: int | None, *, all_steps: bool = False) -> list[str]:
    """Return the directories of the selected checkpoints. They are not verified.

    If ``path`` is a checkpoint, it is selected. If it is the directory of a run, its newest checkpoint is.

    Args:
        step: select the run's checkpoint of this step instead.
        all_steps: select all of the run's checkpoints instead, newest first.

    Raises:
        CheckpointNotFoundError: ``path`` has no such checkpoint.
        UsageError: the options contradict each other.
    """
    from stager.workers.checkpoint.directory.choice import choose_checkpoint
    from stager.workers.checkpoint.directory.run_directory import checkpoint_names
    from stager.workers.checkpoint.storage.paths import place_path
    from stager.workers.errors import UsageError

    path = place_path(path, "path")
    if not all_steps:
        return [choose_checkpoint(path, step)]
    if step is not None:
        raise UsageError("--all and --step were both given; give one of them")
    if is_checkpoint(path):
        raise UsageError(f"{path} is one checkpoint; leave --all out, or give the directory of its run")
    choose_checkpoint(path, None)  # raises if there is none
    return [os.path.join(path, name) for name in checkpoint_names(path).values()]


def require_directory(path: str) -> None:
    """Raise unless ``path`` is a directory.

    Raises:
        CheckpointNotFoundError: ``path`` is no directory.
    """
    from stager.workers.checkpoint.storage.places import storage_of
    from stager.workers.errors import CheckpointNotFoundError

    storage = storage_of(path)
    if not storage.has_directory(path):
        reason = "is not a directory" if storage.exists(path) else "no such directory"
        raise CheckpointNotFoundError(None, reason, path)


def directory_nbytes(path: str) -> int:
    """Size of the files of ``path``; 0 if they cannot be looked at: whoever reads them says why."""
    from stager.workers.checkpoint.storage.places import storage_of

    try:
        return storage_of(path).nbytes(path)
    except OSError:
        return 0
