"""Where a part's data go on a file system: files of known size, written at their offsets."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.storage.posix import direct_io
from stager.workers.checkpoint.storage.posix.direct_io import DirectWriter
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.posix.write_back import CachedWriter, drop_cached
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.faults import point

_DIRECT_FROM_BYTES = 4 << 20  # smaller parts gain nothing


class FileSink(Sink):
    """Writes through the page cache, or past it. Opens each file once.

    Args:
        directory_fd, directory: of the partial directory.
    """

    def __init__(self, layout: Layout, options: SinkOptions, directory_fd: int, directory: str) -> None:
        self._layout = layout
        self._options = options
        self._directory_fd = directory_fd
        self._directory = directory
        self._fds: dict[int, int] = {}
        self._opened = ExitStack()
        self._writer = self._choose_writer()
        self._opened.callback(self._writer.close)

    def _choose_writer(self) -> CachedWriter | DirectWriter:
        direct = self._options.writing.direct_io
        if direct is None:
            direct = direct_io.is_worth_it(self._directory_fd)
        if direct and self._options.nbytes >= _DIRECT_FROM_BYTES:
            return DirectWriter(self._open, self._open_direct, self._options.before_write)
        return CachedWriter(self._open, self._options.before_write, early=self._options.early)

    def put(self, file: int, offset: int, piece: bytes | memoryview, *, in_place: bool = False) -> None:
        """See :meth:`Sink.put`."""
        self._writer.put(file, offset, piece, in_place=in_place)

    def flush(self) -> None:
        """See :meth:`Sink.flush`."""
        self._writer.flush()

    def sync(self) -> None:
        """Sync every file that was written."""
        for file, fd in self._fds.items():
            with storage_errors("sync", self._path(file)):
                point("part.sync")
                os.fsync(fd)
                if self._options.writing.drop_page_cache:
                    drop_cached(fd)

    def close(self) -> None:
        """Wait for the writes under way, and close the files."""
        self._opened.close()

    def _open_direct(self, file: int) -> int:
        name = self._layout.files[file].name
        fd = os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory_fd)
        self._opened.callback(os.close, fd)
        return fd

    def _open(self, file: int) -> int:
        fd = self._fds.get(file)
        if fd is None:
            spec = self._layout.files[file]
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            if file in self._options.own_files:  # created anew: an existing one may be a link
                flags |= os.O_EXCL
                with suppress(FileNotFoundError):
                    os.unlink(spec.name, dir_fd=self._directory_fd)
            fd = os.open(spec.name, flags, 0o666, dir_fd=self._directory_fd)
            self._opened.callback(os.close, fd)
            os.ftruncate(fd, spec.nbytes)
            self._fds[file] = fd
        return fd

    def _path(self, file: int) -> str:
        return os.path.join(self._directory, self._layout.files[file].name)
