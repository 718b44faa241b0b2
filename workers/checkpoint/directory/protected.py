"""Protected steps: retention keeps them, whatever its rules. A sealed list in the run's directory, ``.stager.protected``."""

from __future__ import annotations

import os
from collections.abc import Callable

from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.layout.layout_check import check_step
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CorruptCheckpointError

PROTECTED_NAME = ".stager.protected"


def read_protected(directory: str) -> frozenset[int]:
    """Read the protected steps.

    Raises:
        CorruptCheckpointError: the list is damaged. Nothing may be removed then.
    """
    return _parse(storage_of(directory).read_run_file(directory, PROTECTED_NAME), directory)


def _parse(data: bytes | None, directory: str) -> frozenset[int]:
    if data is None:
        return frozenset()
    path = os.path.join(directory, PROTECTED_NAME)
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

    def changed(data: bytes | None) -> bytes:
        return seal(sorted(change(_parse(data, directory))))

    storage_of(directory).change_run_file(directory, PROTECTED_NAME, changed)
