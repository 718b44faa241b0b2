"""A file system as a storage."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

from stager.workers.checkpoint.documents.head import Head
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest
from stager.workers.checkpoint.documents.names import is_removing, removing_name
from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.directory_entry import DirectoryEntry
from stager.workers.checkpoint.storage.posix.files import storage_errors, vanished
from stager.workers.checkpoint.storage.posix.heads import read_head
from stager.workers.checkpoint.storage.posix.local_file import LocalFile
from stager.workers.checkpoint.storage.posix.lost_manifest import file_of_ours
from stager.workers.checkpoint.storage.posix.own_files import remove_own
from stager.workers.checkpoint.storage.posix.read_lock import holding
from stager.workers.checkpoint.storage.posix.run_lock import FileLock, lock_directory, read_nonce, unused_directory
from stager.workers.checkpoint.storage.posix.transitions import rename_onto_nothing, rename_over
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.checkpoint.storage.storage import Fingerprint, Guarantees, Storage

_OPEN_ATTEMPTS = 10
_PATIENCE_SECS = 5.0  # a process that holds the lock on a run's directory writes one small file


class FileSystem(Storage):
    """Every file system that is mounted on this host; for the methods see :class:`Storage`."""

    guarantees = Guarantees(links=True, quarantine=True, foreign_files=True)
    reads_at_once = 1

    # -- what is there

    def names(self, directory: str) -> list[str]:
        return os.listdir(directory)

    def checkpoint_names(self, directory: str) -> list[str]:
        return os.listdir(directory)

    def removing_names(self, directory: str) -> list[str]:
        return list(filter(is_removing, os.listdir(directory)))

    def has_directory(self, path: str) -> bool:
        return os.path.isdir(path)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def free_bytes(self, directory: str) -> int:
        stats = os.statvfs(directory)
        return stats.f_bavail * stats.f_frsize

    # -- a checkpoint, by its path

    def file_names(self, path: str) -> list[str]:
        return os.listdir(path)

    def has_manifest(self, path: str) -> bool:
        return os.path.lexists(os.path.join(path, MANIFEST_NAME))

    def nbytes(self, path: str) -> int:
        """The size of its files."""
        with os.scandir(path) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())

    def read_manifest(self, path: str) -> bytes:
        return files.read_small(os.path.join(path, MANIFEST_NAME))

    def head(self, path: str) -> Head | None:
        return read_head(path)

    def file_of_ours(self, path: str) -> str | None:
        return file_of_ours(path)

    def read_file(self, path: str, manifest: Manifest, name: str) -> bytes:
        return files.read_small(os.path.join(path, name))

    def open_data(self, path: str, manifest: Manifest, file: int) -> DataFile:
        return LocalFile(files.open_regular(os.path.join(path, manifest.layout.files[file].name)))

    def check_data(self, path: str, manifest: Manifest) -> None:
        return  # a file that is opened tells its size

    def reading(self, path: str) -> AbstractContextManager[bool]:
        return holding(path)

    def fingerprint(self, path: str) -> Fingerprint:
        """Inode, size, mtime and ctime (ns) of each file."""
        stats = [(name, os.lstat(os.path.join(path, name))) for name in os.listdir(path)]
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats}

    def committed_at(self, path: str) -> float:
        return os.lstat(os.path.join(path, MANIFEST_NAME)).st_mtime_ns / 1e9

    # -- a save

    def create(self, path: str) -> Entry:
        with storage_errors("create", path):
            for _ in range(_OPEN_ATTEMPTS):
                self.make(path)
                with suppress(FileNotFoundError):  # it was committed, or removed, between the two calls
                    return self.open(path)
        vanished(path)

    def open(self, path: str) -> Entry:
        return DirectoryEntry(path, files.open_directory(path, follow=False))

    def make(self, path: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(path)

    def rename(self, source: str, target: str) -> bool:
        return rename_onto_nothing(source, target)

    def publish(self, entry: Entry, final: str, replaceable: Callable[[str], bool]) -> str | None:
        return rename_over(entry.path, final, replaceable)

    def tidy(self, directory: str) -> None:
        return  # a directory has its final name when all else is done

    def put_back(self, source: str, final: str) -> None:
        os.rename(source, final)
        files.sync_directory(os.path.dirname(final))

    def sync(self, directory: str) -> None:
        files.sync_directory(directory)

    # -- the run's lock, and its small files

    def lock(self, directory: str, timeout: float, nonce: str = "", *, shared: bool = False) -> RunLock:
        return FileLock(lock_directory(directory, timeout, nonce, shared=shared), directory)

    def lock_nonce(self, directory: str) -> str:
        return read_nonce(directory)

    def unused(self, directory: str) -> AbstractContextManager[None]:
        return unused_directory(directory)

    def check_holder(self, directory: str, nonce: str) -> None:
        return  # nobody can take it as long as the task has the descriptor

    def working(self, directory: str, nonce: str) -> AbstractContextManager[None]:
        return nullcontext()  # the descriptor that came with the task is enough

    def prepare(self, directory: str) -> None:
        with storage_errors("create", directory):
            os.makedirs(directory, exist_ok=True)

    def read_run_file(self, directory: str, name: str) -> bytes | None:
        return files.read_if_exists(os.path.join(directory, name))

    def change_run_file(self, directory: str, name: str, change: Callable[[bytes | None], bytes]) -> None:
        with storage_errors("write", os.path.join(directory, name)):
            directory_fd = files.open_directory(directory)
            try:
                with suppress(OSError):  # this file system has no locks
                    files.flock(directory_fd, fcntl.LOCK_EX, _PATIENCE_SECS)
                data = change(self.read_run_file(directory, name))
                files.write_atomically(directory_fd, directory, name, data, fsync=True)
                os.fsync(directory_fd)
            finally:
                os.close(directory_fd)

    # -- a removal

    def removing_path(self, path: str) -> str:
        directory, name = os.path.split(path)
        return os.path.join(directory, removing_name(name, secrets.token_hex(8)))

    def why_not_removable(self, path: str) -> str | None:
        return "it is a symbolic link; remove the link yourself" if os.path.islink(path) else None

    def remove(self, path: str) -> str | None:
        return remove_own(path)

    def exclusive_bytes(self, paths: Iterable[str]) -> int:
        num_names: Counter[tuple[int, int]] = Counter()
        stats: dict[tuple[int, int], os.stat_result] = {}
        for path in paths:
            with suppress(OSError):  # somebody removes it at this moment
                for stat in [entry.stat(follow_symlinks=False) for entry in os.scandir(path) if is_own(entry.name)]:
                    identity = stat.st_dev, stat.st_ino
                    num_names[identity] += 1
                    stats[identity] = stat
        return sum(stat.st_size for identity, stat in stats.items() if num_names[identity] >= stat.st_nlink)
