"""The replicas that this host keeps of a run's ranks: files in memory (``/dev/shm``), which outlive the trainers.

    <replication.directory>/stager-<user>/<run>-<hash of its directory>/rank-<r>.<0 or 1>[.json]

A replica stays until a newer one takes its place, or the run ends with everything committed. A reboot removes all of them.
Nothing is synced: it is memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from stager.workers.checkpoint.commit.replica import HEADER_SUFFIX, ReplicaHeader, read_header
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import ConfigError, CorruptCheckpointError, StorageError

logger = logging.getLogger("stager")

NUM_SLOTS = 2
_NAME = re.compile(r"rank-([0-9]{1,9})\.[0-9]")


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that is whole: its path, whose snapshot it is, and its header."""

    path: str
    owner: int
    header: ReplicaHeader


class Replicas:
    """The directory of one run's replicas on this host: ``path``. ``root`` is ``replication.directory``."""

    def __init__(self, root: str, run_directory: str) -> None:
        digest = hashlib.blake2b(os.fsencode(run_directory), digest_size=8).hexdigest()
        self._root = root
        self._of_user = os.path.join(root, f"stager-{os.geteuid()}")
        self.path = os.path.join(self._of_user, f"{os.path.basename(run_directory)}-{digest}")

    def create(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: ``root`` is not there, or somebody else has taken the name.
            StorageError
        """
        if not os.path.isdir(self._root):
            raise ConfigError(
                f"replication.directory is {self._root}, which is not a directory; set it to one whose files are in "
                "memory, as /dev/shm"
            )
        for path in (self._of_user, self.path):
            with storage_errors("create", path):
                with suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                found = os.lstat(path)
            # Every user may write to /dev/shm, and what is read from here is written to the run's directory.
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"{path} is not a directory that only this user can use, and replicas are kept there: remove it, or set "
                    "replication.directory to another place"
                )

    def slots(self, owner: int) -> list[str]:
        """The paths of the files for an owner."""
        return [os.path.join(self.path, f"rank-{owner}.{number}") for number in range(NUM_SLOTS)]

    def read(self, path: str) -> ReplicaHeader | None:
        """The header of the replica at ``path``; None if the replica is missing, incomplete or damaged."""
        try:
            return read_header(path)
        except (CorruptCheckpointError, StorageError) as error:
            logger.warning("a damaged replica is not used: %s", error)
            return None

    def whole(self) -> Iterator[Replica]:
        """The replicas whose headers are there and whole."""
        for path, owner in self.files():
            if (header := self.read(path)) is not None:
                yield Replica(path, owner, header)

    def files(self) -> Iterator[tuple[str, int]]:
        """Path and owner of every replica, whole or not."""
        names: list[str] = []
        with storage_errors("list", self.path), suppress(FileNotFoundError):
            names = sorted(os.listdir(self.path))
        for name in names:
            if match := _NAME.fullmatch(name):
                yield os.path.join(self.path, name), int(match[1])

    def remove(self, path: str) -> None:
        """Remove a replica and its header, the header first: it says that the replica is whole."""
        self.remove_header(path)
        with suppress(FileNotFoundError):
            os.unlink(path)

    def remove_header(self, path: str) -> None:
        """Remove a header: the file is no replica from now on."""
        with suppress(FileNotFoundError):
            os.unlink(path + HEADER_SUFFIX)

    def remove_owner(self, owner: int, up_to_step: int) -> None:
        """Remove an owner's replicas up to a step, and its incomplete ones."""
        for path in self.slots(owner):
            header = self.read(path)
            if header is None or header.spec.step <= up_to_step:
                with storage_errors("remove", path):
                    self.remove(path)

    def forget(self, owner: int, is_meant: Callable[[SaveSpec], bool]) -> None:
        """Remove the headers of an owner's replicas of the saves that are meant. Their files keep their memory.

        Raises:
            StorageError
        """
        for path in self.slots(owner):
            header = self.read(path)
            if header is not None and is_meant(header.spec):
                with storage_errors("remove", path):
                    self.remove_header(path)

    def tidy(self) -> None:
        """Remove the directories if nothing is in them any more."""
        for path in (self.path, self._of_user):
            with suppress(OSError):
                os.rmdir(path)
