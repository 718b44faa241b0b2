"""Writing past the page cache (``O_DIRECT``), in whole blocks.

A write through the page cache first has to find pages to copy into. On a machine with busy cores, the trainer waits for its
core meanwhile. Past the cache, the disk reads the slab itself, if a tensor has the same place within a block in the slab and
in the file (``stager.state.placement`` sees to that for large tensors). Other bytes are copied into one of two buffers: one
is filled while the other is written. The trainer's data set stays in the cache.

Bytes that do not fill a block (where a part begins or ends inside one) go through the page cache. So does everything after
the file system has refused a direct write. The kernel keeps the two ways coherent. ``fsync`` is needed in both.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from stager.workers.checkpoint.storage.posix import files

# No disk asks for more than 4 KiB. The kernel drops whole pages from its cache, so no page may be written both ways.
BLOCK_BYTES = max(4096, mmap.PAGESIZE)
BUFFER_BYTES = 8 << 20
IN_PLACE_FROM_BYTES = 64 << 10  # one write for many smaller pieces is faster
_EXT4, _XFS = 0xEF53, 0x58465342  # <linux/magic.h>
_libc = ctypes.CDLL(None, use_errno=True)


def is_worth_it(directory_fd: int) -> bool:
    """Return whether files in this directory gain by it: on ext4 and XFS. Others copy anyway, or wait for a server."""
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return _libc.fstatfs(directory_fd, buffer) == 0 and buffer[0] in (_EXT4, _XFS)


def _whole_blocks(offset: int, nbytes: int) -> tuple[int, int]:
    """Return which of ``nbytes`` bytes, which belong at ``offset`` of the file, fill whole blocks: from, to."""
    return -offset % BLOCK_BYTES, (offset + nbytes) // BLOCK_BYTES * BLOCK_BYTES - offset


_kept_buffers: list[_Buffer] = []
"""Of writers that are closed: new pages for two buffers take as long as writing them."""


class _Buffer:
    """Memory whose bytes from ``start`` to ``end`` must be written. Byte 0 belongs at ``offset``, where a block begins."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.start = self.end = self.offset = 0
        self.written: Future[None] | None = None

    def begin(self, offset: int) -> None:
        """Use the buffer for bytes from ``offset`` on, when its last write has ended."""
        written, self.written = self.written, None
        if written is not None:
            written.result()
        self.start = self.end = offset % BLOCK_BYTES
        self.offset = offset - self.start


class DirectWriter:
    """Takes the bytes of a part, most of them in file order. Every method raises the ``OSError`` of an earlier write, too.

    Args:
        open_file: from a file's number to its descriptor.
        reopen: the same for ``O_DIRECT``; OSError where the file system refuses it.
        before_write: called with the number of bytes of each write.
    """

    def __init__(
        self, open_file: Callable[[int], int], reopen: Callable[[int], int], before_write: Callable[[int], None]
    ) -> None:
        self._open_file = open_file
        self._reopen = reopen
        self._before_write = before_write
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stager-write")
        self._under_way: deque[Future[None]] = deque()
        self._buffers = [_kept_buffers.pop() if _kept_buffers else _Buffer() for _ in range(2)]
        self._file, self._end = -1, 0
        self._direct: dict[int, int] = {}  # descriptors; -1: refused

    def put(self, file: int, offset: int, piece: bytes | memoryview, *, in_place: bool = False) -> None:
        """Take a piece.

        Args:
            in_place: the piece has the same place within a block of memory and within a block of the file, and does not
                change before :meth:`flush`. So its whole blocks are written from where they are.
        """
        if file != self._file or offset != self._end:
            self._submit_buffer()
            self._begin(file, offset)
        data = memoryview(piece)
        self._end = offset + len(data)
        low, high = _whole_blocks(offset, len(data))
        if in_place and high - low >= IN_PLACE_FROM_BYTES:
            self._copy(data[:low])
            self._submit_buffer()
            self._submit(offset + low, data[low:high])
            self._begin(file, offset + high)
            data = data[high:]
        self._copy(data)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._submit_buffer()
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        """Wait for the writes under way, and keep the buffers for the next writer."""
        self._executor.shutdown()
        for buffer in self._buffers:
            buffer.written, buffer.start, buffer.end = None, 0, 0
        _kept_buffers.extend(self._buffers[len(_kept_buffers) :])  # two at most
        self._buffers = []

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
        while len(self._under_way) > 1:  # two writes keep the disk busy; an error is raised here, not lost
            self._under_way.popleft().result()
        self._before_write(len(data))
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
        low, high = _whole_blocks(offset, len(data))
        if direct < 0 or low >= high:
            files.write_all(fd, [data], offset)
            return
        reached = self._write_direct(file, direct, offset, data, low, high)
        for start, end in ((0, low), (reached, len(data))):
            if start < end:
                files.write_all(fd, [data[start:end]], offset + start)

    def _write_direct(self, file: int, direct: int, offset: int, data: memoryview, low: int, high: int) -> int:
        """Write the whole blocks. Returns where it stopped: at ``high``, unless the file system takes no more this way."""
        try:
            while low < high:
                written = os.pwrite(direct, data[low:high], offset + low)
                if written <= 0 or written % BLOCK_BYTES:  # nearly full, for example; the page cache's way reports it
                    return low + written // BLOCK_BYTES * BLOCK_BYTES
                low += written
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct[file] = -1
        return low
