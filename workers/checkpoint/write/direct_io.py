"""Writing past the page cache (``O_DIRECT``), in whole blocks.

A worker that writes through the page cache copies into pages that the kernel first has to find, and where every core is busy
the trainer waits for its core meanwhile. Past it, the disk reads the slab by itself where a tensor lies in it as it does in
the file (``stager.state.placement`` sees to that for large ones); anything else is copied into one of two buffers, which
is filled while the other is written. The trainer's data set stays in the cache.

What does not fill a block (where a part begins or ends in the middle of one), and everything after the file system has
refused, goes through the page cache; the kernel keeps the two ways coherent. ``fsync`` is needed all the same.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from stager.workers.checkpoint.directory import files

# No disk asks for more than 4 KiB. The kernel drops whole pages from its cache: none may be written both ways.
BLOCK_BYTES = max(4096, mmap.PAGESIZE)
BUFFER_BYTES = 8 << 20
IN_PLACE_FROM_BYTES = 64 << 10  # below it, one write for many is better
_EXT4, _XFS = 0xEF53, 0x58465342  # <linux/magic.h>
_libc = ctypes.CDLL(None, use_errno=True)


def is_worth_it(directory_fd: int) -> bool:
    """Whether files there gain by it: on ext4 and XFS. Others copy all the same, or wait for a server each time."""
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return _libc.fstatfs(directory_fd, buffer) == 0 and buffer[0] in (_EXT4, _XFS)


class _Buffer:
    """Its bytes from ``start`` to ``end`` are to be written; byte 0 belongs at ``offset`` of the file, a whole block."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.start = self.end = self.offset = 0
        self.written: Future[None] | None = None

    def begin(self, offset: int) -> None:
        written, self.written = self.written, None
        if written is not None:
            written.result()
        self.start = self.end = offset % BLOCK_BYTES
        self.offset = offset - self.start


class DirectWriter:
    """Takes the bytes of a part, most of them in file order.

    Args:
        open_file: from a file's number to its descriptor.
        reopen: the same for ``O_DIRECT``; OSError where that is refused.
        before_write: called with the file and the number of bytes of each write.

    Raises:
        OSError: from any method; of a write that was begun earlier, too.
    """

    def __init__(
        self, open_file: Callable[[int], int], reopen: Callable[[int], int], before_write: Callable[[int, int], None]
    ) -> None:
        self._open_file = open_file
        self._reopen = reopen
        self._before_write = before_write
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stager-write")
        self._under_way: deque[Future[None]] = deque()
        self._buffers = [_Buffer(), _Buffer()]
        self._file, self._end = -1, 0
        self._direct: dict[int, int] = {}  # descriptors; -1: refused

    def put(self, file: int, offset: int, piece: bytes | memoryview, *, in_place: bool = False) -> None:
        """
        Args:
            in_place: the piece lies within a block of memory where it goes within a block of the file, and stays as it is
                until :meth:`flush`: its whole blocks are written from there.
        """
        if file != self._file or offset != self._end:
            self._submit_buffer()
            self._begin(file, offset)
        data = memoryview(piece)
        self._end = offset + len(data)
        low = -offset % BLOCK_BYTES
        high = (offset + len(data)) // BLOCK_BYTES * BLOCK_BYTES - offset
        if in_place and high - low >= IN_PLACE_FROM_BYTES:
            self._copy(data[:low])
            self._submit_buffer()
            self._submit(offset + low, data[low:high])
            self._begin(file, offset + high)
            data = data[high:]
        self._copy(data)

    def flush(self) -> None:
        """Until everything is written."""
        self._submit_buffer()
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        self._executor.shutdown()
        for buffer in self._buffers:
            buffer.memory.release()

    def _begin(self, file: int, offset: int) -> None:
        self._file, self._end = file, offset
        self._buffers[0].begin(offset)

    def _copy(self, data: memoryview) -> None:
        position = 0
        while position < len(data):
            buffer = self._buffers[0]
            nbytes = min(BUFFER_BYTES - buffer.end, len(data) - position)
            buffer.memory[buffer.end : buffer.end + nbytes] = data[position : position + nbytes]
            buffer.end += nbytes
            position += nbytes
            if buffer.end == BUFFER_BYTES:
                self._submit_buffer()

    def _submit_buffer(self) -> None:
        buffer, other = self._buffers
        if buffer.end > buffer.start:
            data = buffer.memory[buffer.start : buffer.end]
            buffer.written = self._submit(buffer.offset + buffer.start, data)
            self._buffers.reverse()
            other.begin(buffer.offset + buffer.end)

    def _submit(self, offset: int, data: memoryview) -> Future[None]:
        fd, direct = self._open_file(self._file), self._open_direct(self._file)
        while len(self._under_way) > 1:  # the disk is kept busy, and an error is not left behind
            self._under_way.popleft().result()
        self._before_write(self._file, len(data))
        written = self._executor.submit(self._write, self._file, fd, direct, offset, data)
        self._under_way.append(written)
        return written

    def _open_direct(self, file: int) -> int:
        if file not in self._direct:
            try:
                self._direct[file] = self._reopen(file)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct[file] = -1
        return self._direct[file]

    def _write(self, file: int, fd: int, direct: int, offset: int, data: memoryview) -> None:
        low = -offset % BLOCK_BYTES
        high = (offset + len(data)) // BLOCK_BYTES * BLOCK_BYTES - offset
        if direct < 0 or low >= high:
            files.write_all(fd, [data], offset)
            return
        reached = self._write_direct(file, direct, offset, data, low, high)
        for start, end in ((0, low), (reached, len(data))):
            if start < end:
                files.write_all(fd, [data[start:end]], offset + start)

    def _write_direct(self, file: int, direct: int, offset: int, data: memoryview, low: int, high: int) -> int:
        """How far it came: to ``high``, unless the file system takes no more in this way."""
        try:
            while low < high:
                written = os.pwrite(direct, data[low:high], offset + low)
                if written <= 0 or written % BLOCK_BYTES:  # the disk is nearly full, say: the other way will tell
                    return low + written // BLOCK_BYTES * BLOCK_BYTES
                low += written
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct[file] = -1
        return low
