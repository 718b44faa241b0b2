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
    """Return ``nbytes`` bytes at ``address`` as a writable view. The caller keeps the memory alive."""
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
    """Allocate the pages of memory that nobody uses. If the kernel has no call for it, write to each page what is in it.

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
    lock, done, errors = threading.Lock(), 0, list[MemoryError]()

    def work() -> None:
        nonlocal done
        while True:
            # Steps are taken in order, with the lock, so that those taken are always the first ones.
            with lock:
                if done >= nbytes or errors or not keep_going():
                    return
                start = done
                done += min(_STEP_BYTES, nbytes - start)
                length = done - start
            try:
                if not populate(address + start, length):
                    _touch(address + start, length)
            except MemoryError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, name="stager-prefault", daemon=True) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done


def give_back(address: int, nbytes: int) -> bool:
    """Free the memory now. Processes that still map it read zeros from then on.

    Unmapping is not enough: a worker maps a slab until its next task, and a forked data loader as long as it lives.
    """
    return _madvise(address, nbytes, _MADV_REMOVE) == 0


def _touch(address: int, nbytes: int) -> None:
    import numpy as np  # late: workers have no other use for it, and start without it

    first_bytes = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))[:: mmap.PAGESIZE]
    np.bitwise_or(first_bytes, 0, out=first_bytes)


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """Return 0, or the number of the error."""
    return ctypes.get_errno() if _libc.madvise(address, nbytes, advice) != 0 else 0
