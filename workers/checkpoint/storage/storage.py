"""The storage interface: what everything that reads or writes a checkpoint asks of the place where it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from stager.workers.checkpoint.documents.head import Head
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.run_lock import RunLock

Fingerprint: TypeAlias = Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True, slots=True)
class Guarantees:
    """What a storage can do beside the transitions, which each can.

    Attributes:
        links: a file may be shared by several checkpoints (incremental saves).
        quarantine: a save that is not whole can be kept under another name, for replicas to complete it.
        foreign_files: it holds files of other programs, too, such as ``model.pt``; stager reads them by their path.
    """

    links: bool
    quarantine: bool
    foreign_files: bool


class Storage(ABC):
    """Keeps the directories of runs. Paths are absolute, and URLs where the storage is not a file system.

    Unless something else is said, every method raises the ``OSError`` that it gets: ``FileNotFoundError`` or
    ``NotADirectoryError`` if what it was asked for is not there.
    """

    guarantees: Guarantees
    reads_at_once: int
    """How many reads at a time it takes to be fast, if more than there are cores."""

    # -- what is there

    @abstractmethod
    def names(self, directory: str) -> list[str]:
        """Return the names of what is in a run's directory."""

    @abstractmethod
    def checkpoint_names(self, directory: str) -> list[str]:
        """Return the names in a run's directory that checkpoints may have, and perhaps others. Costs less than all."""

    @abstractmethod
    def removing_names(self, directory: str) -> list[str]:
        """Return the names in a run's directory of what is being removed. Costs less than all."""

    @abstractmethod
    def has_directory(self, path: str) -> bool:
        """Return whether ``path`` is there, as a directory."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Return whether anything is at ``path``; raises nothing."""

    @abstractmethod
    def free_bytes(self, directory: str) -> int:
        """Return how many bytes can still be written there."""

    # -- a checkpoint, by its path

    @abstractmethod
    def file_names(self, path: str) -> list[str]:
        """Return the names of the files in the directory ``path``."""

    @abstractmethod
    def has_manifest(self, path: str) -> bool:
        """Return whether there is a manifest in the directory ``path``; raises nothing."""

    @abstractmethod
    def nbytes(self, path: str) -> int:
        """Return about how many bytes the checkpoint at ``path`` has. Costs little."""

    @abstractmethod
    def read_manifest(self, path: str) -> bytes:
        """Read the manifest of the checkpoint at ``path``. Raises CorruptCheckpointError, too: it cannot be one."""

    @abstractmethod
    def head(self, path: str) -> Head | None:
        """Return the head of the checkpoint's manifest; None: it cannot be read. May remember an earlier look."""

    @abstractmethod
    def file_of_ours(self, path: str) -> str | None:
        """Return the name of a file that shows that stager committed what is at ``path``; None: there is none."""

    @abstractmethod
    def read_file(self, path: str, manifest: Manifest, name: str) -> bytes:
        """Read a small file of the checkpoint at ``path``. Raises CorruptCheckpointError, too: it cannot be one."""

    @abstractmethod
    def open_data(self, path: str, manifest: Manifest, file: int) -> DataFile:
        """Open a data file of the checkpoint at ``path``, by its number. Raises CorruptCheckpointError, too."""

    @abstractmethod
    def check_data(self, path: str, manifest: Manifest) -> None:
        """Check, without reading them, that the data files are there that :meth:`open_data` takes for granted.

        Raises:
            CorruptCheckpointError: bytes are missing.
        """

    @abstractmethod
    def reading(self, path: str) -> AbstractContextManager[bool]:
        """Keep retention from removing the checkpoint at ``path``. Yields False if it was renamed or removed just now."""

    @abstractmethod
    def fingerprint(self, path: str) -> Fingerprint:
        """Return what changes if a file of the checkpoint is written to or replaced, by its name."""

    @abstractmethod
    def committed_at(self, path: str) -> float:
        """Return when the manifest was written, by the storage's clock; only the order is good for anything."""

    # -- a save

    @abstractmethod
    def create(self, path: str) -> Entry:
        """Open a partial directory; make it if needed. The run's directory must exist. Raises StorageError."""

    @abstractmethod
    def open(self, path: str) -> Entry:
        """Open a directory."""

    @abstractmethod
    def make(self, path: str) -> None:
        """Make an empty directory, unless something is at ``path``."""

    @abstractmethod
    def rename(self, source: str, target: str) -> bool:
        """Rename a directory if nothing is at ``target``, or an empty directory. Returns whether it did."""

    @abstractmethod
    def publish(self, entry: Entry, final: str, replaceable: Callable[[str], bool]) -> str | None:
        """Give a partial directory, in which there is a manifest, the name of a checkpoint.

        What is there is replaced in one step, if it is replaceable.

        Of two saves of one trainer to one name, the later one stays.

        Returns:
            The path that the replaced checkpoint has now; None: there was none.
        """

    @abstractmethod
    def tidy(self, directory: str) -> None:
        """Remove what commits have left that were interrupted when there was a checkpoint already."""

    @abstractmethod
    def put_back(self, source: str, final: str) -> None:
        """Rename a checkpoint that was replaced, and whose replacement was not committed, to its name."""

    @abstractmethod
    def sync(self, directory: str) -> None:
        """Make the names in a run's directory durable."""

    # -- the run's lock, and its small files

    @abstractmethod
    def lock(self, directory: str, timeout: float, nonce: str = "", *, shared: bool = False) -> RunLock:
        """Take the lock of a run. Its directory must have been prepared.

        Args:
            timeout: seconds.
            nonce: of the run; the run's other ranks read it (:meth:`lock_nonce`).
            shared: as one of several ranks, after the first has shared it.

        Raises:
            DirectoryInUseError: another run still holds it after ``timeout`` seconds.
            StorageError
        """

    @abstractmethod
    def lock_nonce(self, directory: str) -> str:
        """Return the nonce of the run that holds the lock, or has held it; "": nobody knows. Raises nothing."""

    @abstractmethod
    def unused(self, directory: str) -> AbstractContextManager[None]:
        """Keep other runs out for a reader that changes nothing, not even the lock.

        Raises:
            DirectoryInUseError: a run holds the lock.
        """

    @abstractmethod
    def check_holder(self, directory: str, nonce: str) -> None:
        """Raise DirectoryInUseError if another run than that of ``nonce`` has taken the lock meanwhile."""

    @abstractmethod
    def working(self, directory: str, nonce: str) -> AbstractContextManager[None]:
        """Keep the lock of a run from expiring while a worker writes, whose trainer may be gone.

        Args:
            nonce: of the run.
        """

    @abstractmethod
    def prepare(self, directory: str) -> None:
        """Make the directory of a run, if it has to be made. Raises StorageError."""

    @abstractmethod
    def read_run_file(self, directory: str, name: str) -> bytes | None:
        """Read a small file of a run; None: it does not exist. Raises StorageError, CorruptCheckpointError."""

    @abstractmethod
    def change_run_file(self, directory: str, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a small file of a run durably by what ``change`` makes of it. Others who do this at once do it in turn.

        Raises:
            StorageError, and what ``change`` raises
        """

    # -- a removal

    @abstractmethod
    def removing_path(self, path: str) -> str:
        """Return the path that the checkpoint at ``path`` will have while it is removed."""

    @abstractmethod
    def why_not_removable(self, path: str) -> str | None:
        """Say why the checkpoint at ``path`` must not be removed; None: it may be."""

    @abstractmethod
    def remove(self, path: str) -> str | None:
        """Remove a directory that is no checkpoint any more, if it exists, and stager's files in it.

        Returns:
            The new path of the directory if somebody else's files are left in it; else None.
        """

    @abstractmethod
    def exclusive_bytes(self, paths: Iterable[str]) -> int:
        """Return how many bytes removing these directories frees: of files that have no name elsewhere."""
