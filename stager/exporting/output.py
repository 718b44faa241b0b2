"""A file that is there whole and synced, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.errors import UsageError


@contextmanager
def new_file(path: str, *, force: bool) -> Iterator[int]:
    """A descriptor to write to. The file gets its name when the block ends, and is removed when it raises.

    Args:
        force: replace what is there.

    Raises:
        UsageError: something is there.
        StorageError
    """
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a directory; name the file that is to be made")
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


def _put_in_place(temporary: str, path: str, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, path)  # unlike a rename it replaces nothing, whoever came first
        except FileExistsError:
            _refuse(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(path):  # a file system without links
                _refuse(path)
        else:
            return
    os.rename(temporary, path)


def _refuse(path: str) -> None:
    raise UsageError(f"{path}: exists already; nothing was changed. Name another file, or use --force to replace it")
