"""A slab: one anonymous shared mapping that holds one snapshot.

It is a memfd: one descriptor however many tensors, no ``/dev/shm`` size limit, no name that could be left behind. The kernel
frees the memory when the last process that maps it is gone, however it ended. In the trainer a slab is an ordinary shared
``torch.UntypedStorage``; it is sent as torch.multiprocessing sends one (a descriptor given to ``DupFd``). In a worker it is
a plain mapping of that descriptor (``attached.py``).

Invariant: only the trainer writes to a slab, and only while it is leased for staging (``stager.arena``); a worker writes
only what ``copy_shared`` was told to copy. Workers read it only between the hand-over of a save and its commit.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

import torch

from stager.workers.memory import pages
from stager.workers.memory.attached import Memory, attach_slab
from stager.workers.memory.pages import bytes_at

_ids = itertools.count(1)


class Slab(Memory):
    """A shared mapping, in the process that made it. ``slab_id`` is ``<pid>-<n>`` of that process; ``nbytes`` is 1 or more.

    Attributes:
        storage: the memory, as a torch storage.
        warm_nbytes: so many bytes from the start have had their pages allocated by this process, or written.
    """

    __slots__ = ("storage", "warm_nbytes")

    def __init__(self, slab_id: str, storage: torch.UntypedStorage) -> None:
        super().__init__(slab_id, bytes_at(storage.data_ptr(), storage.nbytes()))
        self.storage = storage
        self.warm_nbytes = 0

    @staticmethod
    def create(nbytes: int) -> Slab:
        """Reserve (not yet allocate) ``nbytes`` bytes.

        Raises:
            OSError: out of descriptors or address space.
        """
        return Slab(f"{os.getpid()}-{next(_ids)}", new_shared_memory("stager-slab", max(1, nbytes)))

    def prefault(self, keep_going: Callable[[], bool] = lambda: True, num_threads: int = 1) -> None:
        """Allocate every page now, in steps, without the GIL. Legal while nobody uses the slab. What is in it stays.

        Args:
            keep_going: asked before each step of 16 MiB; what was allocated by then is in ``warm_nbytes``.
            num_threads: this thread included.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """
        start = self.warm_nbytes - self.warm_nbytes % mmap.PAGESIZE
        done = pages.prefault(self.address + start, self.nbytes - start, num_threads, keep_going)
        self.warm_nbytes = max(self.warm_nbytes, start + done)

    @property
    def allocated_nbytes(self) -> int:
        """How much memory it takes now, in whole pages."""
        return os.fstat(self.fd).st_blocks * 512

    def give_back(self) -> None:
        """Free the memory now, for every process that maps the slab. They all read zeros afterwards."""
        self.warm_nbytes = 0
        pages.give_back(self.address, self.nbytes)

    @property
    def fd(self) -> int:
        """The memory's descriptor. torch's storage owns it: use it at once, and never close it."""
        fd, _ = self.storage._share_fd_cpu_()  # torch.multiprocessing's own call
        return int(fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return attach_slab, (self.slab_id, reduction.DupFd(self.fd), self.nbytes)


def new_shared_memory(name: str, nbytes: int) -> torch.UntypedStorage:
    """Return zeroed shared memory: anonymous, with one file descriptor. It is freed with its last user.

    ``name`` is what ``/proc/<pid>/maps`` shows.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)  # memfd_create lets every process open it that can read /proc/<pid>/fd
        os.ftruncate(fd, nbytes)
        new_shared: Any = torch.UntypedStorage
        storage: torch.UntypedStorage = new_shared._new_shared_fd_cpu(fd, nbytes)
        return storage
    finally:
        os.close(fd)  # torch maps and keeps a duplicate
