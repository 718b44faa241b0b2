"""The lock of a run on a file system: a ``flock`` on the file ``.stager.lock`` in the run's directory.

NOTE [ The lock ]
The lock belongs to an open file description. Each write task has a duplicate of its descriptor, so that a worker holds
the lock as long as it has the task. It is released when the trainer and the last of these tasks have ended. So a run
that starts while workers of a killed trainer finish its last checkpoint waits for them, and then sees that checkpoint.
Several ranks of one run share it (``stager/ranks/opening.py``).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.errors import DirectoryInUseError
from stager.workers.long_wait import LongWait
from stager.workers.memory.descriptor import Descriptor

LOCK_NAME = ".stager.lock"


class FileLock(RunLock):
    """The lock that :func:`lock_directory` took.

    Args:
        fd: its descriptor, which belongs to this object from here on.
    """

    def __init__(self, fd: int, directory: str) -> None:
        self.descriptor = Descriptor(fd)
        self._directory = directory

    def share(self) -> None:
        """See :meth:`RunLock.share`."""
        share_lock(self.descriptor.fd, self._directory)

    def close(self) -> None:
        """See :meth:`RunLock.close`."""
        self.descriptor.close()

    def abandon(self) -> None:
        """See :meth:`RunLock.abandon`: otherwise the child would hold the directory."""
        self.descriptor.close()


def read_nonce(directory: str) -> str:
    """Return the nonce in the lock file; "": it is not to be seen, or has none."""
    try:
        with open(os.path.join(directory, LOCK_NAME), errors="replace") as file:
            return file.read(256).partition(" ")[2].strip()
    except OSError:  # not to be seen yet
        return ""


def lock_directory(directory: str, timeout: float, nonce: str = "", *, shared: bool = False) -> int:
    """Take the run's lock; returns its descriptor. See NOTE [ The lock ].

    Args:
        timeout: seconds.
        nonce: of the run; written into the lock file, where the run's other ranks read it.
        shared: take the lock shared, as one of several ranks.

    Raises:
        DirectoryInUseError: another run still holds it after ``timeout`` seconds.
        StorageError: the lock file cannot be created.
    """
    path = os.path.join(directory, LOCK_NAME)
    with storage_errors("lock", path):
        # O_NOFOLLOW: the file is truncated below, so it had better be the one in this directory.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _acquire(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, directory, timeout)
            # Only under the exclusive lock: the other ranks read what its holder wrote.
            if not shared:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} {nonce}".rstrip().encode() + b"\n", 0)
        except BaseException:
            os.close(fd)
            raise
    return fd


def share_lock(fd: int, directory: str) -> None:
    """Turn an exclusive lock of the run into a shared one, so that its other ranks can take it, too.

    Raises:
        DirectoryInUseError: another run took the lock in between: the kernel releases the old lock before it takes the new.
    """
    with storage_errors("lock", os.path.join(directory, LOCK_NAME)):
        _acquire(fd, fcntl.LOCK_SH, directory)


@contextmanager
def unused_directory(directory: str) -> Iterator[None]:
    """Hold the run's lock for a reader that changes nothing; not even the lock file is created.

    Raises:
        DirectoryInUseError: a run holds the lock, alone or shared by its ranks.
    """
    path = os.path.join(directory, LOCK_NAME)
    with ExitStack() as opened:
        with storage_errors("lock", path), suppress(FileNotFoundError):  # no run has been here
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            opened.callback(os.close, fd)
            _acquire(fd, fcntl.LOCK_EX, directory)
        yield


def _acquire(fd: int, kind: int, directory: str, timeout: float = 0) -> None:
    holder = f"the run of process {_holder(fd)}, or workers that it left, to let go of {directory}"
    if files.flock(fd, kind, timeout, LongWait(holder, timeout).tick):
        return
    waited = f" after {timeout:g} s" if timeout else ""
    raise DirectoryInUseError(
        errno.EWOULDBLOCK,
        f"another run (trainer process {_holder(fd)}, or workers that it left) still writes checkpoints here{waited}; "
        "wait for it, or stop it. A Checkpointer can use another directory, or open this one with read_only=True",
        directory,
    )


def _holder(fd: int) -> str:
    """Return the process that the lock file names."""
    return os.pread(fd, 32, 0).decode(errors="replace").partition(" ")[0].strip() or "unknown"
