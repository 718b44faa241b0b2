"""Reading a checkpoint: it is not removed meanwhile, where the storage has locks for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CheckpointNotFoundError


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Hold the read lock of the checkpoint at ``path``. If it cannot be opened, the reader inside will raise why.

    Raises:
        CheckpointNotFoundError: it was removed or replaced while the lock was taken.
    """
    with storage_of(path).reading(path) as there:
        if not there:
            what = "the checkpoint was removed or replaced just now; list the checkpoints again"
            raise CheckpointNotFoundError(None, what, path)
        yield
