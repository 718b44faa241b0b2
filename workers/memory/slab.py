"""A slab: one anonymous shared mapping that holds one snapshot.

Backed by a memfd: one descriptor however many tensors, no ``/dev/shm`` size limit, no name that could leak. The memory is
freed by the kernel when the last process that maps it is gone, however it went. In the trainer it is an ordinary shared
``torch.UntypedStorage``; torch.multiprocessing's way of sharing one (a descriptor handed to ``DupFd``) sends it. In a worker
it is a plain mapping of that descriptor (``attached.py``).

Invariant: only the process that created a slab writes to it, and only while it is leased for staging (``stager.arena``);
workers read it, and only between the hand-over of a save and its commit.
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
from stager.workers.memory.attached import attach_slab
from stager.workers.memory.pages import bytes_at

_ids = itertools.count(1)


class Slab:
    """A shared mapping of ``nbytes`` bytes, in the process that made it.

    Attributes:
        slab_id: ``<pid>-<n>`` of the creating process: the same in every process that maps it.
        storage: the memory, as a torch storage.
        nbytes: its size; at least 1.
        warm_nbytes: so many bytes from the start have had their pages allocated by this process, or written.
    """

    __slots__ = ("__weakref__", "_view", "nbytes", "slab_id", "storage", "warm_nbytes")

    def __init__(self, slab_id: str, storage: torch.UntypedStorage) -> None:
        self.slab_id = slab_id
        self.storage = storage
        self.nbytes = storage.nbytes()
        self.warm_nbytes = 0
        self._view: memoryview | None = None

    @staticmethod
    def create(nbytes: int) -> Slab:
        """Reserve (not yet allocate) ``nbytes`` bytes.

        Raises:
            OSError: out of descriptors or address space.
        """
        fd = os.memfd_create("stager-slab", os.MFD_CLOEXEC)
        try:
            os.fchmod(fd, 0o600)  # it is made for everybody to open who gets to /proc/<pid>/fd
            os.ftruncate(fd, max(1, nbytes))
            return Slab(f"{os.getpid()}-{next(_ids)}", _map(fd, max(1, nbytes)))
        finally:
            os.close(fd)  # the storage keeps its own

    @property
    def view(self) -> memoryview:
        """The memory as writable bytes. Valid as long as the slab lives."""
        if self._view is None:
            self._view = bytes_at(self.storage.data_ptr(), self.nbytes)
        return self._view

    @property
    def address(self) -> int:
        return self.storage.data_ptr()

    def prefault(self, keep_going: Callable[[], bool] = lambda: True, num_threads: int = 1) -> None:
        """Allocate every page now, in steps, without the GIL. Only while nobody uses the slab. What is in it stays.

        Args:
            keep_going: asked before each step of 16 MiB; what was allocated by then is in ``warm_nbytes``.
            num_threads: this one included.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """
        start = self.warm_nbytes - self.warm_nbytes % mmap.PAGESIZE
        done = pages.prefault(self.address + start, self.nbytes - start, num_threads, keep_going)
        self.warm_nbytes = max(self.warm_nbytes, start + done)

    @property
    def allocated_nbytes(self) -> int:
        """What of it takes memory, in whole pages."""
        return os.fstat(self.fd).st_blocks * 512

    def give_back(self) -> None:
        """Free the memory now, for every process that maps the slab. Whoever reads it afterwards reads zeros."""
        self.warm_nbytes = 0
        pages.give_back(self.address, self.nbytes)

    @property
    def fd(self) -> int:
        """The memory's descriptor, which torch's storage owns: for reading and writing at once, never to be closed."""
        fd, _ = self.storage._share_fd_cpu_()
        return int(fd)

    def populate(self, offset: int, nbytes: int) -> None:
        """Allocate the pages of a range, if this kernel can; otherwise writing to them will, one page fault at a time.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """
        pages.populate(self.address + offset, nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        fd, nbytes = self.storage._share_fd_cpu_()  # torch.multiprocessing's own call
        return attach_slab, (self.slab_id, reduction.DupFd(fd), nbytes)


def _map(fd: int, nbytes: int) -> torch.UntypedStorage:
    new_shared: Any = torch.UntypedStorage
    storage: torch.UntypedStorage = new_shared._new_shared_fd_cpu(fd, nbytes)
    return storage
