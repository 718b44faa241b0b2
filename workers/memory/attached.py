"""The trainer's shared memory as a worker maps it: plain mappings of a descriptor, without torch.

A slab is mapped for reading and writing (workers may copy into it, ``sharing.py``), a source for reading only. What is
mapped stays mapped until the trainer says that it has let go of it: mapping it again for every save would fault its pages in
again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any, Protocol

from stager.workers.memory import pages


class Memory(Protocol):
    """A slab, on either side: :class:`stager.workers.memory.slab.Slab` in the trainer, :class:`AttachedSlab` in a worker.

    Attributes:
        slab_id: the same in every process.
        nbytes: its size.
    """

    slab_id: str
    nbytes: int

    @property
    def view(self) -> memoryview:
        """The memory as writable bytes. Valid as long as the slab lives."""

    @property
    def address(self) -> int: ...

    def populate(self, offset: int, nbytes: int) -> None:
        """Allocate the pages of a range ahead of their use, if this kernel can.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """


class AttachedSlab:
    """A slab in a worker. It is unmapped when nothing refers to it, or to its view, any more."""

    __slots__ = ("__weakref__", "_memory", "address", "nbytes", "slab_id")

    def __init__(self, slab_id: str, fd: int, nbytes: int) -> None:
        self.slab_id = slab_id
        self.nbytes = nbytes
        self._memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._memory))

    @property
    def view(self) -> memoryview:
        return memoryview(self._memory)

    def populate(self, offset: int, nbytes: int) -> None:
        pages.populate(self.address + offset, nbytes)


_attached: dict[str, AttachedSlab] = {}


def attach_slab(slab_id: str, sent_fd: Any, nbytes: int) -> AttachedSlab:
    """What a pickled slab becomes."""
    fd = sent_fd.detach()
    try:
        if slab_id not in _attached:
            _attached[slab_id] = AttachedSlab(slab_id, fd, nbytes)
        return _attached[slab_id]
    finally:
        os.close(fd)


def detach_all_but(live: frozenset[str]) -> None:
    """Unmap the attached slabs that the trainer has freed."""
    for slab_id in [s for s in _attached if s not in live]:
        del _attached[slab_id]


class ReadOnlyMapping:
    """A mapping that nothing in this process can write to.

    By the C library: Python's ``mmap`` does not tell the address of what is not writable.

    Attributes:
        address: of the first byte.
    """

    __slots__ = ("__weakref__", "address")

    def __init__(self, fd: int, nbytes: int) -> None:
        address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"{os.strerror(code)}: cannot map {nbytes:,} bytes of the trainer's memory")
        self.address = int(address)
        weakref.finalize(self, _libc.munmap, self.address, nbytes).atexit = False


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]  # off_t of 64-bit Linux
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value
