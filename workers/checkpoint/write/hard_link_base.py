"""The hard-link base of an incremental save: an earlier checkpoint, whose unchanged files are linked.

NOTE [ What may be linked ]
A file of the base is linked (``link(2)``: one more name for the same inode) if both hold:
    1. The bytes to write have the hashes that the base's manifest lists for the file, at the same offsets.
    2. It is still the committed file, as far as can be told without reading it: a regular file of that size, not modified
       after the manifest was written.
A bit that flipped on the disk is not noticed here. Every checkpoint that shares the file then has it (``verify`` names each
of them). That is why every ``full_every``-th save is written without links.

A linked file belongs to several checkpoints, so it is never opened for writing. A part that may link first removes any file
of that name; then it links, or creates the file anew (``O_EXCL``).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from itertools import groupby
from typing import Any

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.envelope import unseal
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, VERSION
from stager.workers.checkpoint.directory.run_directory import checkpoint_name
from stager.workers.checkpoint.layout.layout import ROW_COLUMNS, Layout
from stager.workers.checkpoint.layout.layout_check import check_count
from stager.workers.errors import CorruptCheckpointError

# No hard links on this file system, too many of them, forbidden, or the base belongs to another user.
_CANNOT_LINK = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EINVAL)


class CannotLinkError(Exception):
    """A file cannot be linked and must be written; the text says why."""


class HardLinkBase:
    """An open checkpoint directory, and what its manifest says of each file.

    Made by :meth:`open`. All access is by the directory's descriptor, so removing or replacing its name does no harm.
    """

    def __init__(self, directory_fd: int, name: str, body: dict[str, Any], manifest_mtime_ns: int) -> None:
        self.name = name
        self.generation = check_count(body.get("linked", (0, 0))[1])
        self._directory_fd = directory_fd
        self._mtime_ns = manifest_mtime_ns
        self._segment_bytes = body["segment_bytes"]
        names = [name for name, _ in body["files"]]
        self._rows = {
            names[file]: list(rows) for file, rows in groupby(map(_checked, body["rows"]), lambda row: row[1])
        }

    @staticmethod
    def open(directory: str, step: int) -> HardLinkBase:
        """Open the checkpoint of ``step``.

        Raises:
            CannotLinkError: the checkpoint is missing, or its manifest cannot be read.
            StorageError
        """
        name = checkpoint_name(step)
        path = os.path.join(directory, name)
        try:
            directory_fd = files.open_directory(path, follow=False)
        except OSError as error:
            raise CannotLinkError(f"{name} cannot be opened ({error.strerror})") from error
        try:
            return _read(directory_fd, name)
        except BaseException:
            os.close(directory_fd)
            raise

    def close(self) -> None:
        """Close the directory."""
        os.close(self._directory_fd)

    def hashes(self, layout: Layout, file: int, indices: range) -> list[str] | None:
        """Return the hashes of a file's segments, or None if the base has no file of this name with the same items.

        Args:
            file: index of the file in ``layout``.
            indices: of the file's items.
        """
        rows = self._rows.get(layout.files[file].name)
        if rows is None or self._segment_bytes != layout.segment_bytes or len(rows) != len(indices):
            return None
        hashes: list[str] = []
        for index, (kind, _, *place, shape, stride, of_row) in zip(indices, rows, strict=True):
            item = layout.items[index]
            same_place = place == [item.offset, item.nbytes, item.data_offset, item.data_nbytes, item.dtype]
            if not same_place or (kind, shape, stride) != (item.kind, list(item.shape), list(item.stride)):
                return None
            hashes += of_row
        return hashes

    def link(self, name: str, nbytes: int, target_fd: int) -> None:
        """Link the base's file ``name`` into the directory ``target_fd``, in place of any file of that name.

        Raises:
            CannotLinkError: see NOTE [ What may be linked ].
            OSError
        """
        with suppress(FileNotFoundError):  # a worker that died has left it, half written or linked
            os.unlink(name, dir_fd=target_fd)
        try:
            found = os.stat(name, dir_fd=self._directory_fd, follow_symlinks=False)
            self._check(name, nbytes, found)
            os.link(name, name, src_dir_fd=self._directory_fd, dst_dir_fd=target_fd, follow_symlinks=False)
            linked = os.stat(name, dir_fd=target_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise CannotLinkError(f"{self.name} was removed meanwhile") from error
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            raise CannotLinkError(f"files of {self.name} cannot be linked here ({error.strerror})") from error
        if not os.path.samestat(found, linked):
            os.unlink(name, dir_fd=target_fd)
            raise CannotLinkError(f"{self.name}/{name} was replaced meanwhile")

    def _check(self, name: str, nbytes: int, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
            raise CannotLinkError(f"{self.name}/{name} is damaged")
        if found.st_mtime_ns > self._mtime_ns:
            raise CannotLinkError(f"{self.name}/{name} was written to, or copied, after {self.name} was committed")


def _checked(row: list[Any]) -> list[Any]:
    if len(row) != len(ROW_COLUMNS) + 1 or not isinstance(row[-1], list):
        raise ValueError("a row of items has the wrong columns")
    return row


def _read(directory_fd: int, name: str) -> HardLinkBase:
    """Read the manifest. Only what is compared is checked; the hashes in it prove the rest."""
    try:
        fd = os.open(MANIFEST_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
        with storage_errors("read", name), open(fd, "rb") as file:
            body = unseal(file.read(), os.path.join(name, MANIFEST_NAME))
            mtime_ns = os.fstat(fd).st_mtime_ns
        if body["version"] != VERSION or body["columns"] != [*ROW_COLUMNS, "xxh3_128"]:
            raise CannotLinkError(f"{name} was written by another version of stager")
        return HardLinkBase(directory_fd, name, body, mtime_ns)
    except OSError as error:
        raise CannotLinkError(f"the manifest of {name} cannot be read ({error.strerror})") from error
    except (CorruptCheckpointError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CannotLinkError(f"the manifest of {name} is damaged ({error})") from error
