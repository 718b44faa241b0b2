"""A data file on a file system."""

from __future__ import annotations

import os

from stager.workers.checkpoint.storage.data_file import DataFile

# Of large items, what is read at once: the kernel's copy leaves little of more in the CPU's cache, where it is hashed.
_PIECE_BYTES = 256 << 10


class LocalFile(DataFile):
    """An open file.

    Args:
        fd: its descriptor, which belongs to this object from here on.
    """

    piece_bytes = _PIECE_BYTES

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self.nbytes = os.fstat(fd).st_size
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """See :meth:`DataFile.read_into`."""
        return os.preadv(self._fd, [buffer], offset)

    def close(self) -> None:
        """See :meth:`DataFile.close`."""
        os.close(self._fd)
