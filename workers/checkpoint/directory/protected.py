"""Protected steps: retention keeps them, whatever its rules. A sealed list in the run's directory, ``.stager.protected``."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.layout.layout_check import check_step
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError

PROTECTED_NAME = ".stager.protected"
_PATIENCE_SECS = 5.0  # a process that holds the lock writes one small file


def read_protected(directory: str) -> frozenset[int]:
    """Read the protected steps.

    Raises:
        CorruptCheckpointError: the list is damaged. Nothing may be removed then.
    """
    path = os.path.join(directory, PROTECTED_NAME)
    data = files.read_if_exists(path)
    if data is None:
        return frozenset()
    try:
        return frozenset(map(check_step, unseal(data, path)))
    except (TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            path, f"is not a list of steps: {error}; remove this file, and protect the steps again"
        ) from error


def change_protected_steps(directory: str, change: Callable[[frozenset[int]], frozenset[int]]) -> None:
    """Write what ``change`` makes of the protected steps, durably. Processes that do this at once do it in turn.

    Raises:
        CorruptCheckpointError: the list is damaged.
        StorageError: it cannot be written.
    """
    with storage_errors("write", os.path.join(directory, PROTECTED_NAME)):
        directory_fd = files.open_directory(directory)
        try:
            with suppress(OSError):  # this file system has no locks
                files.flock(directory_fd, fcntl.LOCK_EX, _PATIENCE_SECS)
            steps = change(read_protected(directory))
            files.write_atomically(directory_fd, directory, PROTECTED_NAME, seal(sorted(steps)), fsync=True)
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
