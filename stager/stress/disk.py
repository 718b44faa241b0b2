"""A small file system for an episode, which can be filled.

It needs the right to mount. It is mounted in a mount namespace of its own: no other process sees it, and the kernel removes
it however this process ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from contextlib import suppress

_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = (1 << 14) | (1 << 18)
_MNT_DETACH = 2
_BALLAST = ".ballast"  # beside the run's directory, on the same file system
_CHUNK_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def enter_own_namespace() -> str | None:
    """Give the calling thread, and all that it starts, a mount namespace of its own. Returns why that failed, or None."""
    if _libc.unshare(_CLONE_NEWNS) != 0 or _libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None) != 0:
        return f"mounting is not allowed here ({os.strerror(ctypes.get_errno())})"
    with tempfile.TemporaryDirectory() as directory:
        try:
            SmallDisk(directory, 1 << 20).unmount()
        except OSError as error:
            return f"a tmpfs cannot be mounted here ({error})"
    return None


class SmallDisk:
    """A tmpfs of ``nbytes`` at ``path``.

    Raises:
        OSError: it cannot be mounted.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        self.path = path
        os.makedirs(path, exist_ok=True)
        if _libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={nbytes}".encode()) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)

    def fill(self, free_bytes: int) -> None:
        """Fill the disk until about ``free_bytes`` are left."""
        fd = os.open(os.path.join(self.path, _BALLAST), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            size = 0
            for chunk in (_CHUNK_BYTES, 4096):
                with suppress(_Full):
                    while True:
                        size += _write(fd, chunk)
            os.ftruncate(fd, max(0, size - free_bytes))
        finally:
            os.close(fd)

    def relieve(self) -> None:
        """Free the space that was filled."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, _BALLAST))

    def unmount(self) -> None:
        """Unmount it. Processes that still use it keep it until they end."""
        if _libc.umount2(os.fsencode(self.path), _MNT_DETACH) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), self.path)


class _Full(Exception):
    pass


def _write(fd: int, nbytes: int) -> int:
    try:
        return os.write(fd, bytes(nbytes))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _Full from None
        raise
