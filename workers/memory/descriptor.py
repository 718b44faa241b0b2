"""A file descriptor that travels with a task, and stays open in the worker as long as the worker has the task.

The lock of a run's directory is one (NOTE [ The lock ] in ``checkpoint/directory/run_directory.py``): whoever has a
duplicate of its descriptor holds it, a message that waits in a socket included.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing import reduction
from typing import Any


class Descriptor:
    """A descriptor. In the process that made it, whoever opened it closes it.

    Attributes:
        fd: its number in this process.
    """

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return receive, (reduction.DupFd(self.fd),)


def receive(sent_fd: Any) -> Descriptor:
    """Unpickle a descriptor. It is closed with the last reference to it."""
    descriptor = Descriptor(sent_fd.detach())
    weakref.finalize(descriptor, os.close, descriptor.fd).atexit = False
    return descriptor
