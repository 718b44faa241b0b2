"""A file descriptor that travels with a task, and stays open in the worker as long as the worker has the task.

The lock of a run's directory is one (NOTE [ The lock ] in ``checkpoint/storage/posix/run_lock.py``): whoever has a
duplicate of its descriptor holds it, a message that waits in a socket included.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing import reduction
from typing import Any


class Descriptor:
    """An open descriptor. It is closed with the last reference to it, or by :meth:`close`.

    Attributes:
        fd: its number in this process.
    """

    __slots__ = ("__weakref__", "_finalizer", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._finalizer = weakref.finalize(self, os.close, fd)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Close it. Idempotent."""
        self._finalizer()

    def __reduce__(self) -> tuple[Any, ...]:
        return receive, (reduction.DupFd(self.fd),)


def receive(sent_fd: Any) -> Descriptor:
    """Unpickle a descriptor."""
    return Descriptor(sent_fd.detach())
