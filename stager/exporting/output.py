"""The exported file: there whole and synced, or not at all; and where the bytes of a part of a tensor go in it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import UsageError


@contextmanager
def new_file(path: str, *, force: bool) -> Iterator[int]:
    """Open a new file for writing. It gets its name when the block ends; if the block raises, it is removed.

    Args:
        force: replace a file that has this name.

    Raises:
        UsageError: a file has this name.
        StorageError
    """
    if not force and os.path.lexists(path):
        _refuse(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    with storage_errors("write", path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            _put_in_place(temporary, path, force)
            files.sync_directory(os.path.dirname(path) or ".")
        finally:
            with suppress(OSError):
                os.unlink(temporary)


def refuse_directory(path: str) -> None:
    """Raise unless a file could have this name.

    Raises:
        UsageError: a directory has it.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a directory; name the file to write")


def _put_in_place(temporary: str, path: str, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces a file, not even one that came meanwhile
        except FileExistsError:
            _refuse(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(path):  # the file system has no hard links: look, and then rename
                _refuse(path)
        else:
            return
    os.rename(temporary, path)


def _refuse(path: str) -> None:
    raise UsageError(f"{path}: exists already; name another file, or replace this one with force=True (--force)")


@dataclass(frozen=True, slots=True)
class Runs:
    """A part in C order is runs of ``nbytes`` bytes, each in one place of the whole tensor, which is in C order too.

    Attributes:
        nbytes: of one run.
        shape, strides: how many runs there are along each dimension, and how far apart they start in the whole, in bytes.
        first: where the first run starts in the whole, in bytes.
    """

    nbytes: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    first: int = 0

    def place(self, run: int) -> int:
        """Where in the whole a run starts, in bytes."""
        position = self.first
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            run, index = divmod(run, length)
            position += index * stride
        return position

    def write(self, fd: int, offset: int, data: Iterable[memoryview]) -> None:
        """Write the bytes of the part to where they are in the whole, which starts at ``offset`` of the file."""
        position = 0  # in the part
        for chunk in data:
            done = 0
            while done < len(chunk):
                run, within = divmod(position, self.nbytes)
                count = min(len(chunk) - done, self.nbytes - within)
                files.write_all(fd, [chunk[done : done + count]], offset + self.place(run) + within)
                done, position = done + count, position + count


def runs_of(whole: tuple[int, ...], part: tuple[int, ...], offsets: tuple[int, ...], itemsize: int) -> Runs:
    """Find the runs of a part. ``whole`` and ``part`` are shapes; ``offsets`` say where the part begins in the whole."""
    strides = tuple(stride * itemsize for stride in contiguous_stride(whole))
    outer = len(whole)
    while outer > 0 and part[outer:] == whole[outer:]:
        outer -= 1
    # Below ``outer`` the part is as wide as the whole, so a step along ``outer`` continues where the one before ended.
    nbytes = math.prod(part[outer:]) * itemsize
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return Runs(max(1, nbytes), part[:outer], strides[:outer], first)
