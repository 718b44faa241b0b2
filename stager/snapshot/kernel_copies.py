"""Copies that the kernel makes: memory that is gone by then is an error there, where reading it ends the process.

A guarded tensor is copied after ``save()`` has returned, and the program may resize its storage at any moment, which frees
the memory. ``pwritev`` into a memfd then fails with EFAULT. It takes 1.8 times as long as a memmove into pages that are
there (8.4 and 4.7 GB/s), and 0.6 times as long into pages that are not (1.2 and 2.0), because it need not clear them first.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from stager.workers.checkpoint.directory.files import IOV_MAX
from stager.workers.errors import InternalError, StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
_libc.pwritev.restype = ctypes.c_ssize_t


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
            code = ctypes.get_errno() if written else 0
            if code == errno.EINTR:
                continue
            if code == errno.EFAULT:
                raise MemoryGoneError(int(vectors[0, 0]))
            if code in (errno.ENOMEM, errno.ENOSPC):
                raise MemoryError(f"the kernel refused {left:,} bytes of shared memory: {os.strerror(code)}")
            raise StorageError(code or None, "the kernel does not copy a snapshot into shared memory", "memfd")
        offset += written
        left -= written
        vectors = _rest(vectors, written)


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
