"""The hard-link base of an incremental save: an earlier checkpoint, whose unchanged files are linked, not written.

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
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from itertools import groupby
from typing import Any

from stager.workers.checkpoint.documents.envelope import unseal
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, VERSION
from stager.workers.checkpoint.layout.items import ROW_COLUMNS
from stager.workers.checkpoint.layout.layout import Layout, Segment
from stager.workers.checkpoint.layout.layout_check import check_count
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.unchanged import HardLinkBase, HashAll, UnchangedFiles
from stager.workers.errors import CorruptCheckpointError
from stager.workers.faults import point

# No hard links on this file system, too many of them, forbidden, or the base belongs to another user.
_CANNOT_LINK = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EINVAL)


class CannotLinkError(Exception):
    """A file cannot be linked and must be written; the text says why."""


def sync_linked(linked: Iterable[int], layout: Layout, directory_fd: int, directory: str) -> None:
    """Sync linked files: the base may have been written without ``fsync``, and a link needs a durable inode.

    Args:
        linked: numbers of the files.
        directory: of the open directory, for messages.
    """
    for file in linked:
        name = layout.files[file].name
        with storage_errors("sync", os.path.join(directory, name)):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def link_unchanged(
    of: HardLinkBase, layout: Layout, whole: Mapping[int, list[Segment]], hash_all: HashAll, directory_fd: int
) -> UnchangedFiles:
    """Link files whose bytes are the same in the hard-link base. See :meth:`Entry.link_unchanged`."""
    unchanged = UnchangedFiles()
    try:
        base = _OpenBase(of.directory, of.name)
    except CannotLinkError as error:
        unchanged.note = f"not incremental: {error}"
        return unchanged
    with closing(base):
        point("link.begin")
        if base.generation + 1 >= of.full_every:
            unchanged.note = f"written in full, as one of {of.full_every} saves is (persistence.full_every)"
            return unchanged
        for file, segments in whole.items():
            if base.has(layout, file, segments, hash_all(segments), unchanged.hashes):
                _link(base, layout, file, directory_fd, unchanged)
        if unchanged.linked:
            unchanged.generation = base.generation + 1
    return unchanged


def _link(base: _OpenBase, layout: Layout, file: int, directory_fd: int, unchanged: UnchangedFiles) -> None:
    """Link one file of the base into the directory, and enter it into ``unchanged``; or note there why it must be written.

    Args:
        file: its index in ``layout.files``.
    """
    spec = layout.files[file]
    with storage_errors("link", os.path.join(base.name, spec.name)):
        try:
            base.link(spec.name, spec.nbytes, directory_fd)
        except CannotLinkError as error:
            unchanged.note = unchanged.note or f"written although unchanged: {error}"
            return
    unchanged.linked.add(file)
    unchanged.nbytes += spec.nbytes
    point("link.linked")  # for tests: the file is linked, and no receipt says so yet


class _OpenBase:
    """An open checkpoint directory, and what its manifest says of each file.

    All access is by the directory's descriptor, so removing or replacing its name does no harm.

    Raises:
        CannotLinkError: the checkpoint ``name`` is missing, or its manifest cannot be read.
        StorageError
    """

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        try:
            self._directory_fd = files.open_directory(os.path.join(directory, self.name), follow=False)
        except OSError as error:
            raise CannotLinkError(f"{self.name} cannot be opened ({error.strerror})") from error
        try:
            self._read_manifest()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the directory."""
        os.close(self._directory_fd)

    def has(
        self, layout: Layout, file: int, segments: list[Segment], hashes: Iterable[str], known: dict[Segment, str]
    ) -> bool:
        """Return whether the base has this file, with these hashes. Stops at the first hash that differs.

        Args:
            file: its index in ``layout.files``.
            segments: all segments of the file.
            known: receives the hashes up to where it stopped.
        """
        expected = self._hashes(layout, file, range(segments[0].index, segments[-1].index + 1))
        if len(expected) != len(segments):
            return False
        for segment, of_base, actual in zip(segments, expected, hashes, strict=True):
            known[segment] = actual
            if actual != of_base:
                return False
        return True

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
            if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
                raise CannotLinkError(f"{self.name}/{name} is damaged")
            if found.st_mtime_ns > self._mtime_ns:
                raise CannotLinkError(
                    f"{self.name}/{name} is not the file that was committed: it was changed since, or replaced by a copy"
                )
            os.link(name, name, src_dir_fd=self._directory_fd, dst_dir_fd=target_fd, follow_symlinks=False)
            linked = os.stat(name, dir_fd=target_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise CannotLinkError(f"{self.name} was removed meanwhile") from error
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            raise CannotLinkError(f"files of {self.name} cannot be linked here ({error.strerror})") from error
        if not os.path.samestat(found, linked):  # between the check and the link, another file took the name
            os.unlink(name, dir_fd=target_fd)
            raise CannotLinkError(f"{self.name}/{name} was replaced while it was linked")

    def _hashes(self, layout: Layout, file: int, indices: range) -> list[str]:
        """Return the hashes of a file's segments; none if the base has no file of this name with the same items."""
        rows = self._rows.get(layout.files[file].name, [])
        if self._segment_bytes != layout.segment_bytes or len(rows) != len(indices):
            return []
        hashes: list[str] = []
        for index, (kind, _, *place, shape, stride, of_row) in zip(indices, rows, strict=True):
            item = layout.items[index]
            same_place = place == [item.offset, item.nbytes, item.data_offset, item.data_nbytes, item.dtype]
            if not same_place or (kind, shape, stride) != (item.kind, list(item.shape), list(item.stride)):
                return []
            hashes += of_row
        return hashes

    def _read_manifest(self) -> None:
        """Read the manifest. Only what is compared is checked; the hashes in it prove the rest."""
        name, flags = self.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(MANIFEST_NAME, flags, dir_fd=self._directory_fd)
            with storage_errors("read", name), open(fd, "rb") as file:
                body = unseal(file.read(), os.path.join(name, MANIFEST_NAME))
                self._mtime_ns = os.fstat(fd).st_mtime_ns
            if body["version"] != VERSION or body["columns"] != [*ROW_COLUMNS, "xxh3_128"]:
                raise CannotLinkError(f"{name} has other columns than this version of stager links")
            self.generation = check_count(body.get("linked", (0, 0))[1])
            self._segment_bytes = body["segment_bytes"]
            names = [name for name, _ in body["files"]]
            by_file = groupby(map(_checked, body["rows"]), lambda row: row[1])
            self._rows = {names[file]: list(rows) for file, rows in by_file}
        except OSError as error:
            raise CannotLinkError(f"the manifest of {name} cannot be read ({error.strerror})") from error
        except (CorruptCheckpointError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CannotLinkError(f"the manifest of {name} is damaged ({error})") from error


def _checked(row: list[Any]) -> list[Any]:
    if len(row) != len(ROW_COLUMNS) + 1 or not isinstance(row[-1], list):
        raise ValueError("a row of items has the wrong columns")
    return row
