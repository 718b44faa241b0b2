"""The read lock: retention does not remove a checkpoint while it is read.

Readers hold the directory's flock shared. A remover takes it exclusively, without waiting (``retention.py``), and holds it
only while it renames the directory. A commit that replaces a checkpoint holds it for a moment, too. So a reader waits for
moments only. If a remover was stopped right then, or the file system has no locks, the reader goes on without the lock:
what it reads is checked by hashes anyway.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stager.workers.checkpoint.storage.posix.files import flock, is_still, open_directory, storage_errors

_PATIENCE_SECS = 5.0


@contextmanager
def holding(path: str) -> Iterator[bool]:
    """Hold the read lock, if it can be had. Yields False if the directory was renamed or removed while it was taken.

    Yields True without a lock if the file system has none, if it is not to be had in time, or if the directory cannot be
    opened: whoever reads it then reports the error.

    Raises:
        StorageError: the directory cannot be looked at.
    """
    try:
        directory_fd = open_directory(path)
    except OSError:
        yield True
        return
    try:
        with suppress(OSError):  # this file system has no locks
            flock(directory_fd, fcntl.LOCK_SH, _PATIENCE_SECS)
        # After the lock, because a remover may have renamed the directory while this process waited for it.
        with storage_errors("look at", path):
            there = is_still(path, directory_fd)
        yield there
    finally:
        os.close(directory_fd)
