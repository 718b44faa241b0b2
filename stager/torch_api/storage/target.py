"""The destination of a save: the final path, and the partial directory beside it until the commit."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import xxhash

from stager.workers.checkpoint.commit.commit import put_in_place
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, IndexFile, Manifest, ManifestHeader
from stager.workers.checkpoint.documents.names import parse_checkpoint
from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.formats.dcp import METADATA_NAME
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.directory_entry import DirectoryEntry
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.posix.own_files import remove_own
from stager.workers.errors import StorageError, UsageError

_LARGEST_STEP = (1 << 63) - 1  # that a manifest can hold


class Target:
    """The destination of one save.

    Every rank has to find the partial directory by itself, because a planner that caches its plans delivers nothing new
    from the coordinator. So the name of the partial directory follows from the path. If the path is
    ``<run>/step-00000100``, ``Checkpointer`` recognises the partial directory, too. Of two simultaneous saves to one path
    at least one fails: a data file is created by one writer only, and the coordinator commits only the directory that it
    made itself.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        self.path = os.path.realpath(local_path(path, "the path of the checkpoint"))
        self.partial = f"{self.path}.partial-0"
        self._overwrite = overwrite
        self._made: os.stat_result | None = None  # the partial directory that this coordinator made

    @property
    def step(self) -> int:
        """The training step, if the path is named as ``Checkpointer`` names checkpoints; else 0."""
        step = parse_checkpoint(os.path.basename(self.path))
        return step if step is not None and step <= _LARGEST_STEP else 0

    def prepare(self) -> None:
        """Make the partial directory. The coordinator calls it before any rank writes.

        Raises:
            UsageError: the path exists and must not be replaced.
            StorageError
        """
        self._check_replaceable()
        with storage_errors("create", self.partial):
            remove_own(self.partial)  # may be left by a save that failed or was killed
            _make_directories(os.path.dirname(self.path))
            os.mkdir(self.partial)
            self._made = os.stat(self.partial)

    def _check_replaceable(self) -> None:
        with storage_errors("save", self.path):
            names = sorted(os.listdir(self.path)) if os.path.lexists(self.path) else []
        if names and not self._overwrite:
            raise UsageError(f"{self.path}: already exists, and overwrite=False; save to another path or remove it")
        strange = next((name for name in names if not is_own(name)), None)
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
        self, header: ManifestHeader, layout: Layout, hashes: tuple[tuple[str, ...], ...], metadata: bytes, fsync: bool
    ) -> None:
        """Write ``.metadata`` and the manifest, and give the directory its final name. The coordinator calls it.

        Raises:
            StorageError: the commit failed; nothing at the final path has changed.
        """
        with storage_errors("commit", self.partial):
            directory_fd = self.open_partial()
            try:
                if self._made is None or not os.path.samestat(self._made, os.fstat(directory_fd)):
                    message = "another save to the same path replaced the partial directory of this one"
                    raise StorageError(errno.EBUSY, message, self.partial)
                files.write_atomically(directory_fd, self.partial, METADATA_NAME, metadata, fsync)
                index_file = IndexFile(METADATA_NAME, len(metadata), xxhash.xxh3_128_hexdigest(metadata))
                manifest = Manifest(header, layout, hashes, (index_file,))
                # Last, because it proves that every other file is complete.
                files.write_atomically(directory_fd, self.partial, MANIFEST_NAME, manifest.to_bytes(), fsync)
                put_in_place(DirectoryEntry(self.partial, directory_fd), self.path, manifest, fsync, is_replaceable)
            finally:
                os.close(directory_fd)
        self._made = None

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the partial directory if the block raises: then the coordinator cannot commit what other ranks write."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the error of the block says more
                remove_own(self.partial)
            raise


def is_replaceable(path: str) -> bool:
    """Whether a directory holds only files of a checkpoint, so that replacing it loses no other file."""
    return all(map(is_own, os.listdir(path)))


def _make_directories(path: str) -> None:
    """Make a directory and its parents, durably."""
    if not os.path.isdir(path):
        _make_directories(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        files.sync_directory(os.path.dirname(path))
