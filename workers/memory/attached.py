"""The trainer's shared memory as a worker maps it: plain mappings of a descriptor, without torch.

A slab is mapped for reading and writing, because workers may copy into it (``shared_source.py``); a source for reading only.
A mapping stays until the trainer says that it let go of the memory: mapping it again for every save would fault its pages in
again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

from stager.workers.memory import pages


class Memory:
    """A slab as one process maps it: a ``Slab`` (``slab.py``) in the trainer, an :class:`AttachedSlab` in a worker.

    Attributes:
        slab_id: the same in every process.
        view: the memory as writable bytes.
        address: of the first byte, in this process.
    """

    __slots__ = ("__weakref__", "address", "nbytes", "slab_id", "view")

    def __init__(self, slab_id: str, view: memoryview) -> None:
        self.slab_id = slab_id
        self.view = view
        self.nbytes = view.nbytes
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))

    def populate(self, offset: int, nbytes: int) -> None:
        """Allocate the pages of a range ahead of their use. An old kernel cannot: writing then allocates them one by one.

        Raises:
            MemoryError: the kernel has no more memory to give.
        """
        pages.populate(self.address + offset, nbytes)


class AttachedSlab(Memory):
    """A slab in a worker. It is unmapped when nothing refers to it, or to its view, any more."""

    __slots__ = ()

    def __init__(self, slab_id: str, fd: int, nbytes: int) -> None:
        super().__init__(slab_id, memoryview(mmap.mmap(fd, nbytes)))


_attached: dict[str, AttachedSlab] = {}


def attach_slab(slab_id: str, sent_fd: Any, nbytes: int) -> AttachedSlab:
    """Unpickle a slab."""
    fd = sent_fd.detach()
    try:
        if slab_id not in _attached:
            _attached[slab_id] = AttachedSlab(slab_id, fd, nbytes)
        return _attached[slab_id]
    finally:
        os.close(fd)


def detach_all_but(live: frozenset[str]) -> None:
    """Unmap the attached slabs that the trainer has freed."""
    for slab_id in _attached.keys() - live:
        del _attached[slab_id]


class ReadOnlyMapping:
    """A mapping that nothing in this process can write to. ``address`` is that of the first byte.

    It is made by the C library: Python's ``mmap`` does not tell the address of memory that is not writable.
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
