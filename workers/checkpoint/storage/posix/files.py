"""System calls on files, relative to a directory's descriptor, with errors that name path and cause.

Working relative to a descriptor means that a directory that is renamed or replaced meanwhile cannot lead a write astray.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from stager.workers.errors import CorruptCheckpointError, StorageError

IOV_MAX = 1024  # Linux
DOCUMENT_BYTES = 1 << 30  # that are read at once, at most; a manifest has about 130 bytes per item
_HOLE_BYTES = 1 << 20  # below this a hole costs nothing; no file of these kinds has as many zeros in a row

_LOCK_POLL_SECS = 0.02

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)

_READING = ("open", "read", "list", "look at")
_OF_A_RUN = ("save", "commit", "sync")  # the directory was made, or found, before
_IN_A_RUN = re.compile(r"step-\d{8,}|\.stager\.")
_WHAT_TO_DO = {
    errno.ENOSPC: "free space on this file system, or lower what is kept",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check the directory's owner and mode",
    errno.ESTALE: "the network file system lost the directory; remount it",
    errno.EIO: "the device reports an I/O error; see dmesg",
    errno.ENAMETOOLONG: "use a directory with a shorter path",
    errno.ENOTDIR: "a file stands where a directory should be; move it away, or use another directory",
    errno.EEXIST: "something else has this name; move it away, or use another directory",
    errno.ELOOP: "a symbolic link stands where a directory or file should be; remove it",
    errno.EFBIG: "the file is larger than this file system or the process's limit (ulimit -f) allows",
    errno.EMFILE: "the process has too many files open; raise its limit (ulimit -n)",
    errno.ENOLCK: "this file system gives no locks; mount it with them, or use another one",
}


@contextmanager
def storage_errors(action: str, path: str) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StorageError` that names the action, the path, and what to do."""
    try:
        yield
    except StorageError:  # an inner block has named a more precise action
        raise
    except OSError as error:
        advice = _advice(action, path, error.errno or 0)
        raise StorageError(error.errno, f"cannot {action}" + (f"; {advice}" if advice else ""), path) from error


def _advice(action: str, path: str, code: int) -> str | None:
    if code != errno.ENOENT:
        return _WHAT_TO_DO.get(code)
    if "://" in path:
        return "it was removed while it was in use, or is being removed"
    return _what_is_missing(action, path)


def _what_is_missing(action: str, path: str) -> str:
    """Say what of a path is not there. Only what a run had made before can have been removed while it was in use."""
    missing = path
    while (parent := os.path.dirname(missing)) != missing and not os.path.lexists(parent):
        missing = parent
    if os.path.lexists(path):
        return "it was removed or renamed at this moment, or something in it was"
    if missing == path and action in _READING:
        return "there is nothing of this name"
    if action in _OF_A_RUN or any(_IN_A_RUN.match(name) for name in path.split(os.sep)):
        gone = "it" if missing == path else missing
        return (
            f"{gone} was removed or renamed while it was in use; undo that, or save again with a new Checkpointer or "
            "storage writer"
        )
    if os.path.islink(parent):
        return f"the link {parent} leads nowhere"
    if action == "create":
        return f"{parent} takes no new directories; use another one"
    return f"the directory {missing if missing != path else parent} does not exist; create it, or use another one"


def open_directory(path: str, *, follow: bool = True) -> int:
    """Open a directory; returns its descriptor. With ``follow=False`` a symbolic link is refused (ENOTDIR or ELOOP)."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))


def is_still(path: str, directory_fd: int) -> bool:
    """Return whether the opened directory still has this path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(directory_fd))
    except FileNotFoundError:
        return False


def open_regular(path: str, access: int = os.O_RDONLY) -> int:
    """Open a regular file; returns its descriptor. Links (they lead elsewhere) and FIFOs (they block) are refused.

    Raises:
        CorruptCheckpointError: ``path`` is not a regular file.
        OSError: from ``open``.
    """
    try:
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise CorruptCheckpointError(path, "is not a regular file") from error
        raise
    is_regular = False
    try:
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
    finally:
        if not is_regular:
            os.close(fd)
    if not is_regular:
        raise CorruptCheckpointError(path, "is not a regular file")
    return fd


def read_small(path: str) -> bytes:
    """Read the whole of a small file (manifest, save record, receipt, index).

    Raises:
        CorruptCheckpointError: it is too large, has holes, or is not a regular file.
        OSError: from ``open`` or ``read``.
    """
    with open(open_regular(path), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > DOCUMENT_BYTES:
            raise CorruptCheckpointError(path, f"is {nbytes} bytes long, which is too much for a file of its kind")
        if nbytes > _HOLE_BYTES and os.lseek(file.fileno(), 0, os.SEEK_HOLE) < nbytes:
            # Reading a hole takes memory, but no disk.
            raise CorruptCheckpointError(path, "has a hole: it is not as long as it seems")
        file.seek(0)
        return file.read(nbytes)


def write_all(fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
    """Write all buffers at ``offset``: repeat ``pwritev``, which may write less than it was given."""
    pending = [memoryview(b) for b in buffers if len(b)]
    while pending:
        written = os.pwritev(fd, pending[:IOV_MAX], offset)
        if written == 0:  # or this loop would not end
            raise OSError(errno.EIO, "the file system accepts no more bytes, and gives no reason")
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def write_atomically(directory_fd: int, directory: str, name: str, data: bytes, fsync: bool) -> None:
    """Create ``name`` with ``data``, whole or not at all: write a temporary file, sync it, rename it."""
    temporary = f"{name}.{os.getpid()}.tmp"
    with storage_errors("write", os.path.join(directory, name)):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666, dir_fd=directory_fd)
            try:
                write_all(fd, [data], 0)
                # Before the rename: otherwise a power failure can leave the name without the bytes.
                if fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory_fd)
            raise


def read_if_exists(path: str) -> bytes | None:
    """Read a small file as :func:`read_small` does. Returns None if it does not exist."""
    with storage_errors("read", path):
        try:
            return read_small(path)
        except FileNotFoundError:
            return None


def remove(path: str) -> None:
    """Remove a file, a link or a whole directory, if it exists. Another process may remove it at the same time."""
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        # First what can be removed, although another process may remove files at the same time. The second call raises
        # for what is left.
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path)


def exchange(first: str, second: str) -> bool:
    """Swap two paths in one step (``renameat2``). Returns False where the file system cannot."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), second)


def flock(fd: int, kind: int, timeout: float, waiting: Callable[[], None] = lambda: None) -> bool:
    """Lock an open file (``fcntl.LOCK_SH`` or ``LOCK_EX``). Returns False if others hold it for ``timeout`` seconds.

    Args:
        waiting: called now and then while it waits.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            waiting()
            time.sleep(_LOCK_POLL_SECS)
        else:
            return True


def sync_directory(path: str) -> None:
    """Sync a directory, so that renames in it are durable."""
    fd = open_directory(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def vanished(partial: str) -> NoReturn:
    """Raise a StorageError: somebody removed the partial directory."""
    message = "the partial checkpoint was removed while it was being written; find out by whom, then save again"
    raise StorageError(errno.ENOENT, message, partial)
