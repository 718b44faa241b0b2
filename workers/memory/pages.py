"""The pages of a shared mapping: allocated ahead of their use, and given back to the system at their end.

The calls to the kernel run without the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

_MADV_REMOVE = 9
_MADV_POPULATE_WRITE = 23  # Linux 5.14; allocates the pages now instead of one page fault at a time later
_STEP_BYTES = 16 << 20
_OUT_OF_MEMORY = (errno.ENOMEM, errno.EFAULT)  # EFAULT: a fault would have ended in SIGBUS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def bytes_at(address: int, nbytes: int) -> memoryview:
    """``nbytes`` bytes at ``address`` as a writable view. The caller keeps the owner alive."""
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def populate(address: int, nbytes: int) -> bool:
    """Allocate the pages that hold ``nbytes`` bytes from ``address`` on; what is in them stays.

    Returns:
        False when this kernel cannot (older than 5.14): they are then allocated one by one when they are written.

    Raises:
        MemoryError: the kernel has no more memory to give.
    """
    start = address - address % mmap.PAGESIZE
    code = _madvise(start, address + nbytes - start, _MADV_POPULATE_WRITE)
    if code in _OUT_OF_MEMORY:
        raise MemoryError(f"the kernel refused {nbytes:,} bytes of shared memory: {os.strerror(code)}")
    return code == 0


def prefault(address: int, nbytes: int, num_threads: int = 1, keep_going: Callable[[], bool] = lambda: True) -> int:
    """Allocate the pages of memory that nobody uses; where the kernel has no call for it, by writing to each what is there.

    More threads help where the pages have to come from a hypervisor: 0.3 GB/s with one, 0.5 with two on a 2-core virtual
    machine; on pages that the guest had used before 2.7 and 2.9.

    Args:
        address: of the first page.
        keep_going: asked before each step of 16 MiB.

    Returns:
        How many bytes from ``address`` on have their pages now.

    Raises:
        MemoryError: the kernel has no more memory to give.
    """
    steps = _Steps(nbytes, keep_going)

    def work() -> None:
        while (start := steps.next()) is not None:
            length = min(_STEP_BYTES, nbytes - start)
            try:
                if not populate(address + start, length):
                    _touch(address + start, length)
            except MemoryError as error:
                steps.fail(error)

    threads = [threading.Thread(target=work, name="stager-prefault", daemon=True) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    return steps.done()


def give_back(address: int, nbytes: int) -> bool:
    """Free the memory now, whoever else maps it or holds its descriptor: they read zeros from then on.

    Unmapping is not enough: a worker maps a slab until its next task, a forked data loader process for as long as it lives.
    """
    return _madvise(address, nbytes, _MADV_REMOVE) == 0


def _touch(address: int, nbytes: int) -> None:
    import numpy as np  # here: the workers, which have no other use for it, start without it

    first_bytes = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))[:: mmap.PAGESIZE]
    np.bitwise_or(first_bytes, 0, out=first_bytes)


class _Steps:
    """Deals out the steps in order, so that those taken are always the first ones."""

    def __init__(self, nbytes: int, keep_going: Callable[[], bool]) -> None:
        self._nbytes = nbytes
        self._keep_going = keep_going
        self._next = 0
        self._error: MemoryError | None = None
        self._lock = threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            if self._next >= self._nbytes or self._error is not None or not self._keep_going():
                return None
            start, self._next = self._next, self._next + _STEP_BYTES
            return start

    def fail(self, error: MemoryError) -> None:
        with self._lock:
            self._error = error

    def done(self) -> int:
        if self._error is not None:
            raise self._error
        return min(self._next, self._nbytes)


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """0, or the error's number."""
    return ctypes.get_errno() if _libc.madvise(address, nbytes, advice) != 0 else 0
