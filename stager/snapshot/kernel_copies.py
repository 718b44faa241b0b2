"""Copies that the kernel makes: memory that is gone by then is an error there, where reading it ends the process.

A guarded tensor is copied after ``save()`` has returned, and the program may resize its storage at any moment, which frees
the memory. These system calls then fail with EFAULT:

    pwritev            into a memfd. Many stretches in one call; pages that are not there yet need not be cleared first (2.0
                       GB/s, a memmove 1.2). The kernel lets one thread at a time write to a file: 7 GB/s, however many ask
    process_vm_readv   of this process itself, into pages that are there. One thread 6.5 GB/s, two 11.4; each stretch of a
                       call costs three times as much. Containers may forbid it

A memmove into pages that are there copies 16 GB/s with one thread and 18 with two (2 cores, Linux 6.18).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from stager.workers.checkpoint.storage.posix.files import IOV_MAX
from stager.workers.errors import InternalError, StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
_libc.pwritev.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class MemoryGoneError(Exception):
    """The memory that was to be copied is not mapped any more. Whoever copies knows which tensor's it was.

    Attributes:
        address: of the first byte of a stretch that was not copied.
    """

    def __init__(self, address: int) -> None:
        super().__init__(f"nothing is mapped at {address:#x}")
        self.address = address


def vectors(stretches: Sequence[tuple[int, int]]) -> Any:
    """Return (address, number of bytes) pairs as the kernel takes them: as an array of ``struct iovec``."""
    return np.array(stretches, dtype=np.uint64).reshape(len(stretches), 2)


def write(fd: int, vectors: Any, offset: int) -> None:
    """Copy stretches of memory to a file in memory, one behind the other.

    Args:
        vectors: see :func:`vectors`; at most IOV_MAX.
        offset: where in the file.

    Raises:
        MemoryGoneError: some of it is not mapped.
        MemoryError: the kernel has no more memory to give.
        StorageError: it refuses for another reason.
    """
    left = int(vectors[:, 1].sum())
    while left:
        written = _libc.pwritev(fd, vectors.ctypes.data, len(vectors), offset)
        if written <= 0:
            _raise_for(ctypes.get_errno() if written else 0, int(vectors[0, 0]), left)
            continue
        offset += written
        left -= written
        vectors = _rest(vectors, written)


def read_into(target: int, address: int, nbytes: int) -> int:
    """Copy memory to memory that is there and stays there. Several threads may do so at the same time.

    Args:
        target, address: of the first byte to write, and to read.

    Returns:
        The number of bytes that are copied: all of them, or fewer if this process may not call ``process_vm_readv``.

    Raises:
        MemoryGoneError: some of it is not mapped.
        MemoryError: see :func:`write`.
    """
    copied = 0
    while copied < nbytes:
        to, source = vectors([(target + copied, nbytes - copied)]), vectors([(address + copied, nbytes - copied)])
        count = _libc.process_vm_readv(os.getpid(), to.ctypes.data, 1, source.ctypes.data, 1, 0)
        if count <= 0:
            code = ctypes.get_errno() if count else 0
            if code not in (errno.EINTR, errno.EFAULT, errno.ENOMEM):
                break  # a container or a kernel that does not let a process do so
            _raise_for(code, address + copied, nbytes - copied)
        copied += max(count, 0)
    return copied


def _raise_for(code: int, address: int, left: int) -> None:
    """Raise the error for ``errno``; interrupted calls are made again.

    Args:
        code: ``errno``; 0 if the call did nothing and gave no reason.
        address: of the first stretch that was not copied.
        left: bytes that were not copied.
    """
    if code == errno.EINTR:
        return
    if code == errno.EFAULT:
        raise MemoryGoneError(address)
    if code in (errno.ENOMEM, errno.ENOSPC):
        raise MemoryError(f"the kernel refused {left:,} bytes of shared memory: {os.strerror(code)}")
    raise StorageError(code or None, "the kernel does not copy a snapshot into shared memory", "memfd")


def _rest(vectors: Any, written: int) -> Any:
    """Return what is left of the stretches behind their first ``written`` bytes."""
    ends = np.cumsum(vectors[:, 1])
    first = int(np.searchsorted(ends, written, side="right"))
    rest = vectors[first:].copy()
    if len(rest):
        left = int(ends[first]) - written
        rest[0] = int(rest[0, 0]) + int(rest[0, 1]) - left, left
    return rest


class Scratch:
    """A file in memory through which memory is read."""

    def __init__(self) -> None:
        try:
            self._fd = os.memfd_create("stager-scratch", os.MFD_CLOEXEC)
        except OSError as error:
            raise StorageError(error.errno, "a file in memory cannot be made", "memfd") from error

    def read(self, vectors: Any) -> bytes:
        """Read stretches of memory, one behind the other.

        Args:
            vectors: as for :func:`write`, of any length.

        Raises:
            MemoryGoneError, MemoryError, StorageError: see :func:`write`.
        """
        nbytes = 0
        for start in range(0, len(vectors), IOV_MAX):
            block = vectors[start : start + IOV_MAX]
            write(self._fd, block, nbytes)
            nbytes += int(block[:, 1].sum())
        data = os.pread(self._fd, nbytes, 0)
        if len(data) != nbytes:
            raise InternalError(f"{len(data)} of {nbytes} bytes were read of a file in memory")
        return data

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
