"""Protected steps: retention keeps them, whatever its rules. A sealed list in the run's directory, ``.stager.protected``."""

from __future__ import annotations

import os
from collections.abc import Collection

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.envelope import seal, unseal
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.layout.layout_check import check_step
from stager.workers.errors import CorruptCheckpointError

PROTECTED_NAME = ".stager.protected"


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


def write_protected(directory: str, steps: Collection[int]) -> None:
    """Write the protected steps, durably."""
    with storage_errors("write", os.path.join(directory, PROTECTED_NAME)):
        directory_fd = files.open_directory(directory)
        try:
            files.write_atomically(directory_fd, directory, PROTECTED_NAME, seal(sorted(steps)), fsync=True)
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
