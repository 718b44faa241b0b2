"""A slab: one anonymous shared mapping that holds one snapshot.

Backed by a memfd: one descriptor however many tensors, no ``/dev/shm`` size limit, no name that could leak. The memory is
freed by the kernel when the last process that maps it is gone, however it went. Seen from torch it is an ordinary shared
``torch.UntypedStorage``; torch.multiprocessing's way of sharing one (a descriptor handed to ``DupFd``) sends it.

Invariant: only the process that created a slab writes to it, and only while it is leased for staging (``stager.arena``);
workers read it, and only between the hand-over of a save and its commit.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

import torch

_MADV_POPULATE_WRITE = 23  # Linux 5.14; allocates the pages now instead of one page fault at a time later
_PREFAULT_STEP_BYTES = 64 << 20

_ids = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Slab:
    """A shared mapping of ``nbytes`` bytes.

    Attributes:
        slab_id: ``<pid>-<n>`` of the creating process: the same in every process that maps it.
        storage: the memory, as a torch storage.
        nbytes: its size; at least 1.
    """

    __slots__ = ("__weakref__", "_view", "nbytes", "slab_id", "storage")

    def __init__(self, slab_id: str, storage: torch.UntypedStorage) -> None:
        self.slab_id = slab_id
        self.storage = storage
        self.nbytes = storage.nbytes()
        self._view: memoryview | None = None

    @staticmethod
    def create(nbytes: int) -> Slab:
        """Reserve (not yet allocate) ``nbytes`` bytes.

        Raises:
            OSError: out of descriptors or address space.
        """
        fd = os.memfd_create("stager-slab", os.MFD_CLOEXEC)
        try:
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

    def prefault(self, keep_going: Callable[[], bool] = lambda: True) -> bool:
        """Allocate every page now, in steps, without the GIL; False when this kernel cannot.

        Args:
            keep_going: asked before each step of 64 MiB.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """
        for start in range(0, self.nbytes, _PREFAULT_STEP_BYTES):
            if not keep_going():
                return True
            nbytes = min(_PREFAULT_STEP_BYTES, self.nbytes - start)
            if _libc.madvise(self.address + start, nbytes, _MADV_POPULATE_WRITE) != 0:
                code = ctypes.get_errno()
                if code in (errno.ENOMEM, errno.EFAULT):  # over a limit
                    raise MemoryError(f"the kernel refused {self.nbytes} bytes of shared memory: {os.strerror(code)}")
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        fd, nbytes = self.storage._share_fd_cpu_()  # torch.multiprocessing's own call
        return _attach, (self.slab_id, reduction.DupFd(fd), nbytes)


def _map(fd: int, nbytes: int) -> torch.UntypedStorage:
    new_shared: Any = torch.UntypedStorage
    storage: torch.UntypedStorage = new_shared._new_shared_fd_cpu(fd, nbytes)
    return storage


def _attach(slab_id: str, sent_fd: Any, nbytes: int) -> Slab:
    fd = sent_fd.detach()
    try:
        if slab_id not in _attached:
            _attached[slab_id] = Slab(slab_id, _map(fd, nbytes))
        return _attached[slab_id]
    finally:
        os.close(fd)


# Mapping a slab again for every save would fault its pages in again. ``detach_all_but`` lets go of what the trainer
# no longer has.
_attached: dict[str, Slab] = {}


def detach_all_but(live: frozenset[str]) -> None:
    """In a worker: unmap the attached slabs that the trainer has freed."""
    for slab_id in [s for s in _attached if s not in live]:
        del _attached[slab_id]


def bytes_at(address: int, nbytes: int) -> memoryview:
    """``nbytes`` bytes at ``address`` as a writable view. The caller keeps the owner alive."""
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
