"""Writing past the page cache (``O_DIRECT``): whole blocks, from page-aligned buffers, while the next buffer is filled.

A worker that writes through the page cache copies into pages that the kernel first has to find, and where every core is busy
the trainer waits for its core meanwhile. Past it, the copy goes into the same two buffers each time, the disk reads them by
itself, and the trainer's data set stays in the cache.

What does not fill a block (where a part begins or ends in the middle of one), and everything after the file system has
refused, goes through the page cache; the kernel keeps the two ways coherent. ``fsync`` is needed all the same.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from workers import files

# No disk asks for more than 4 KiB. The kernel drops whole pages from its cache: none may be written both ways.
BLOCK_BYTES = max(4096, mmap.PAGESIZE)
BUFFER_BYTES = 8 << 20
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

    def wait(self) -> None:
        written, self.written = self.written, None
        if written is not None:
            written.result()


class DirectWriter:
    """Takes the bytes of a part in file order.

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
        self._buffers = [_Buffer(), _Buffer()]
        self._file, self._end = -1, 0
        self._direct: dict[int, int] = {}  # descriptors; -1: refused

    def put(self, file: int, offset: int, piece: bytes | memoryview) -> None:
        if file != self._file or offset != self._end:
            self.flush()
            self._begin(file, offset)
        data, position = memoryview(piece), 0
        while position < len(data):
            buffer = self._buffers[0]
            nbytes = min(BUFFER_BYTES - buffer.end, len(data) - position)
            buffer.memory[buffer.end : buffer.end + nbytes] = data[position : position + nbytes]
            buffer.end += nbytes
            position += nbytes
            if buffer.end == BUFFER_BYTES:
                self._submit()
        self._end = offset + len(data)

    def flush(self) -> None:
        """Until everything is written."""
        if self._buffers[0].end > self._buffers[0].start:
            self._submit()
        for buffer in self._buffers:
            buffer.wait()

    def close(self) -> None:
        self._executor.shutdown()
        for buffer in self._buffers:
            buffer.memory.release()

    def _begin(self, file: int, offset: int) -> None:
        buffer = self._buffers[0]
        buffer.start = buffer.end = offset % BLOCK_BYTES
        buffer.offset = offset - buffer.start
        self._file, self._end = file, offset

    def _submit(self) -> None:
        buffer, other = self._buffers
        fd, direct = self._open_file(self._file), self._open_direct(self._file)
        other.wait()  # one write at a time is under way: the disk is kept busy, and an error stops the next
        self._before_write(self._file, buffer.end - buffer.start)
        buffer.written = self._executor.submit(self._write, self._file, fd, direct, buffer)
        other.start = other.end = 0
        other.offset = buffer.offset + buffer.end
        self._buffers.reverse()

    def _open_direct(self, file: int) -> int:
        if file not in self._direct:
            try:
                self._direct[file] = self._reopen(file)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct[file] = -1
        return self._direct[file]

    def _write(self, file: int, fd: int, direct: int, buffer: _Buffer) -> None:
        low = -(-buffer.start // BLOCK_BYTES) * BLOCK_BYTES
        high = buffer.end // BLOCK_BYTES * BLOCK_BYTES
        if direct < 0 or low >= high:
            self._write_plain(fd, buffer, [(buffer.start, buffer.end)])
            return
        reached = self._write_direct(file, direct, buffer, low, high)
        self._write_plain(fd, buffer, [(buffer.start, low), (reached, buffer.end)])

    def _write_direct(self, file: int, direct: int, buffer: _Buffer, low: int, high: int) -> int:
        """How far it came: to ``high``, unless the file system takes no more in this way."""
        try:
            while low < high:
                written = os.pwrite(direct, buffer.memory[low:high], buffer.offset + low)
                if written <= 0 or written % BLOCK_BYTES:  # the disk is nearly full, say: the other way will tell
                    return low + written // BLOCK_BYTES * BLOCK_BYTES
                low += written
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct[file] = -1
        return low

    @staticmethod
    def _write_plain(fd: int, buffer: _Buffer, ranges: Sequence[tuple[int, int]]) -> None:
        for start, end in ranges:
            if start < end:
                files.write_all(fd, [buffer.memory[start:end]], buffer.offset + start)
