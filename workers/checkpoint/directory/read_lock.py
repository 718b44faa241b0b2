"""Who reads a checkpoint holds it: retention does not remove it under his hands.

Readers hold the directory's flock shared; who removes it needs it exclusively and does not wait (``removal.py``). He holds
it while he takes the directory's name away, no longer, and a commit holds it for the moment after the rename. So a reader
has to wait for moments only; if somebody was stopped right there, or where the file system has no locks, he goes on
without: what he reads is checked anyway.
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
    """Hold the checkpoint at ``path``. What cannot be opened at all is left for the reader to find out.

    Raises:
        CheckpointNotFoundError: it was removed, or replaced, just now.
        StorageError
    """
    with holding(path) as there:
        if not there:
            raise CheckpointNotFoundError(None, "the checkpoint was removed, or replaced, just now", path)
        yield


@contextmanager
def holding(path: str) -> Iterator[bool]:
    """The same for who does not mind. Gives False when what was there has lost its name meanwhile.

    Raises:
        StorageError
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
