"""The destination of a save: the final path, and the partial directory beside it until the commit."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress

import xxhash

from stager.workers.checkpoint.commit.commit import put_in_place
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.manifest import IndexFile, Manifest, ManifestHeader
from stager.workers.checkpoint.directory.run_directory import checkpoint_name
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.errors import StorageError, UsageError

_OURS = re.compile(r"(\.metadata|manifest\.json|__[0-9]+\.metadata)(\.[0-9]+)?(\.tmp)?|__[0-9]+_[0-9a-z]+\.distcp")
_STEP = re.compile(r"step-([0-9]{8,18})")


class Target:
    """The destination of one save.

    Every rank has to find the partial directory by itself, because a planner that caches its plans delivers nothing new
    from the coordinator. So the name of the partial directory follows from the path. If the path is
    ``<run>/step-00000100``, ``Checkpointer`` recognises the partial directory, too. Of two simultaneous saves to one path
    at least one fails: a data file is created by one writer only, and the coordinator commits only the directory that it
    made itself.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        self.path = os.path.realpath(os.fspath(path))
        self.partial = f"{self.path}.partial-0"
        self._overwrite = overwrite
        self._identity: tuple[int, int] | None = (
            None  # device and inode of the partial directory that this coordinator made
        )

    @property
    def step(self) -> int:
        """The training step, if the path is named as ``Checkpointer`` names checkpoints; else 0."""
        match = _STEP.fullmatch(os.path.basename(self.path))
        return int(match[1]) if match is not None and checkpoint_name(int(match[1])) == match[0] else 0

    def prepare(self) -> None:
        """Make the partial directory. The coordinator calls it before any rank writes.

        Raises:
            UsageError: the path exists and must not be replaced.
            StorageError
        """
        self._check_replaceable()
        with storage_errors("create", self.partial):
            files.remove(self.partial)  # may be left by a save that failed or was killed
            _make_directories(os.path.dirname(self.path))
            os.mkdir(self.partial)
            status = os.stat(self.partial)
        self._identity = (status.st_dev, status.st_ino)

    def _check_replaceable(self) -> None:
        with storage_errors("save", self.path):
            try:
                names = os.listdir(self.path)
            except FileNotFoundError:
                return
        if names and not self._overwrite:
            raise UsageError(f"{self.path}: already exists, and overwrite=False; save to another path or remove it")
        strange = next((name for name in sorted(names) if not _OURS.fullmatch(name)), None)
        if strange is not None:
            raise UsageError(
                f"{self.path}: holds {strange}, which is not a file of a checkpoint and would be deleted; "
                "save to another path, or remove the file"
            )

    def open_partial(self) -> int:
        """Open the partial directory, and return its descriptor.

        Raises:
            StorageError: it does not exist.
        """
        try:
            return files.open_directory(self.partial, follow=False)
        except FileNotFoundError as error:
            message = "this rank does not see the coordinator's partial directory; all ranks must share one file system"
            raise StorageError(error.errno, message, self.partial) from error

    def commit(
        self,
        header: ManifestHeader,
        layout: Layout,
        hashes: tuple[tuple[str, ...], ...],
        index: Mapping[str, bytes],
        fsync: bool,
    ) -> None:
        """Write index files and manifest, and give the directory its final name. The coordinator calls it.

        Raises:
            StorageError: the commit failed; nothing at the final path has changed.
        """
        with storage_errors("commit", self.partial):
            directory_fd = self.open_partial()
            try:
                status = os.fstat(directory_fd)
                if (status.st_dev, status.st_ino) != self._identity:
                    raise StorageError(
                        errno.EBUSY,
                        "another save to the same path replaced the partial directory of this one",
                        self.partial,
                    )
                index_files = []
                for name, data in index.items():
                    files.write_atomically(directory_fd, self.partial, name, data, fsync)
                    index_files.append(IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
                manifest = Manifest(header, layout, hashes, tuple(index_files))
                files.write_atomically(directory_fd, self.partial, "manifest.json", manifest.to_bytes(), fsync)
                put_in_place(self.partial, self.path, manifest, directory_fd, fsync, is_replaceable)
            finally:
                os.close(directory_fd)
        self._identity = None

    def discard(self) -> None:
        """Remove the partial directory. Errors are ignored, because the caller already raises the one that led here."""
        with suppress(OSError):
            files.remove(self.partial)


def is_replaceable(path: str) -> bool:
    """Whether a directory holds only files of a DCP checkpoint, so that replacing it loses no other file."""
    return all(map(_OURS.fullmatch, os.listdir(path)))


def _make_directories(path: str) -> None:
    """Make a directory and its parents, durably."""
    if not os.path.isdir(path):
        _make_directories(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        files.sync_directory(os.path.dirname(path))
