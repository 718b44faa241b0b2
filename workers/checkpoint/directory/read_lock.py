"""The read lock: retention does not remove a checkpoint while it is read.

Readers hold the directory's flock shared. A remover takes it exclusively, without waiting (``retention.py``), and holds it
only while it renames the directory. A commit that replaces a checkpoint holds it for a moment, too. So a reader waits for
moments only. If a remover was stopped right then, or the file system has no locks, the reader goes on without the lock:
what it reads is checked by hashes anyway.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stager.workers.checkpoint.directory.files import is_still, open_directory, storage_errors
from stager.workers.errors import CheckpointNotFoundError

_PATIENCE_SECS = 5.0
_POLL_SECS = 0.02


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Hold the read lock of the checkpoint at ``path``. If it cannot be opened, the reader inside will raise why.

    Raises:
        CheckpointNotFoundError: it was removed or replaced while the lock was taken.
        StorageError
    """
    with holding(path) as there:
        if not there:
            raise CheckpointNotFoundError(
                None, "the checkpoint was removed or replaced just now; list the checkpoints again", path
            )
        yield


@contextmanager
def holding(path: str) -> Iterator[bool]:
    """Hold the read lock as :func:`reading` does, but yield False if the directory was renamed or removed meanwhile.

    If the directory cannot be opened, yields True without a lock: whoever reads it then reports the error.

    Raises:
        StorageError: the directory cannot be looked at.
    """
    try:
        directory_fd = open_directory(path)
    except OSError:
        yield True
        return
    try:
        _lock(directory_fd)
        with storage_errors("look at", path):
            there = is_still(path, directory_fd)
        yield there
    finally:
        os.close(directory_fd)


def _lock(directory_fd: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECS
    while True:
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECS)
        except OSError:
            return
        else:
            return
