"""Receives one rank's snapshots into two files in turn.

The newest save of which every rank's partner has the snapshot is *whole*. The file that holds this rank's part of it is not
overwritten: whatever happens while the next snapshot arrives, on any rank, a whole state stays in memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from stager.config.host import available_memory_bytes
from stager.replication.replicas import Replicas
from stager.workers.checkpoint.commit.replica import HEADER_SUFFIX, ReplicaHeader
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError, ReplicationError, StorageError

MESSAGE_BYTES = 64 << 20  # of the messages that a snapshot travels in
_SPARE_BYTES = 1 << 20


def messages(nbytes: int) -> Iterator[tuple[int, int]]:
    """Iterate over the byte ranges (start, end) of the messages that a snapshot of ``nbytes`` bytes travels in."""
    for start in range(0, nbytes, MESSAGE_BYTES):
        yield start, min(nbytes, start + MESSAGE_BYTES)


class Keeper:
    """Keeps the newest snapshots of one other rank. A :class:`~stager.replication.exchange.Receiver`, used for each of them.

    Args:
        whole_id: returns the id of the newest save that is known to be whole.
        give_up: asked with a save id before its replica is overwritten; False: that save is whole by now.
    """

    def __init__(
        self, replicas: Replicas, owner: int, whole_id: Callable[[], str], give_up: Callable[[str], bool]
    ) -> None:
        self._replicas = replicas
        self._owner = owner
        self._whole_id = whole_id
        self._give_up = give_up
        self._still = threading.Lock()  # held while a file is chosen, and while none may be
        self._maps: dict[str, mmap.mmap] = {}  # kept: mapping them again would fault every page in again
        # Of the snapshot that arrives now: its header, as it came; its file; and why it is dropped, if it is.
        self._header_bytes = b""
        self._path = ""
        self._problem: Exception | None = None

    def holding_still(self) -> AbstractContextManager[Any]:
        """Overwrite no replica meanwhile, because they are being read. A snapshot that arrives is received and dropped."""
        return self._still

    def begin(self, header: bytes) -> Iterator[torch.Tensor]:
        """Iterate over the memory to receive a snapshot into, a message at a time.

        If there is none, the snapshot is received all the same, and dropped: the connection stays whole.
        """
        self._header_bytes, self._problem = header, None
        try:
            nbytes = ReplicaHeader.from_bytes(header, f"the header that rank {self._owner} sent").nbytes
        except CorruptCheckpointError as error:
            raise ReplicationError(str(error), self._owner) from error
        try:
            self._path = self._free_one()
            memory = self._map(self._path, nbytes)
        except (OSError, ReplicationError) as error:
            self._problem = error
            scratch = torch.empty(min(nbytes, MESSAGE_BYTES), dtype=torch.uint8)
            yield from (scratch[: end - start] for start, end in messages(nbytes))
            return
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        yield from (whole[start:end] for start, end in messages(nbytes))

    def finish(self) -> ReplicaHeader:
        """Write the header of the snapshot that has arrived beside its file. That makes the file a replica.

        Raises:
            ReplicationError: the snapshot was dropped, or the header cannot be written.
        """
        if isinstance(self._problem, ReplicationError):
            raise self._problem
        if self._problem is not None:
            problem = f"this host has no memory for the replica of rank {self._owner}: {self._problem}"
            raise ReplicationError(problem) from self._problem
        try:
            with storage_errors("write", self._path + HEADER_SUFFIX):
                directory_fd = files.open_directory(self._replicas.path)
                try:
                    name = os.path.basename(self._path) + HEADER_SUFFIX
                    files.write_atomically(directory_fd, self._replicas.path, name, self._header_bytes, fsync=False)
                finally:
                    os.close(directory_fd)
        except StorageError as error:
            raise ReplicationError(f"the replica of rank {self._owner} cannot be kept: {error}") from error
        return ReplicaHeader.from_bytes(self._header_bytes, self._path)

    def forget(self) -> None:
        """Unmap the files."""
        self._maps.clear()

    def _free_one(self) -> str:
        """Choose the file to overwrite, and remove its header: it is no replica from now on."""
        # Not a wait: the partner would wait, too, and its snapshot is dropped instead.
        if not self._still.acquire(blocking=False):
            raise ReplicationError(
                f"the replica of rank {self._owner} is not kept: a checkpoint is being restored from the earlier ones"
            )
        try:
            path = self._choose()
            with storage_errors("write", path):
                self._replicas.remove_header(path)
            return path
        finally:
            self._still.release()

    def _choose(self) -> str:
        """Choose the file to overwrite: an empty one; else the older, unless only that one belongs to a whole save."""
        headers = {path: self._replicas.read(path) for path in self._replicas.slots(self._owner)}
        found = {path: header.spec for path, header in headers.items() if header is not None}
        if len(found) < len(headers):
            return next(path for path in headers if path not in found)
        older, newer = sorted(found, key=lambda path: found[path].created)
        whole = self._whole_id()
        if found[newer].save_id == whole:
            return older
        if found[older].save_id != whole and self._give_up(found[older].save_id):
            return older
        return newer if self._give_up(found[newer].save_id) else older

    def _map(self, path: str, nbytes: int) -> mmap.mmap:
        with storage_errors("write", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                size, known_size = capacity(nbytes), len(self._maps.get(path, b""))
                if nbytes <= known_size <= size and known_size == os.fstat(fd).st_size:
                    return self._maps[path]
                self._maps.pop(path, None)  # unmapped before the file changes its size
                os.ftruncate(fd, size)
                _allocate(path, fd, size)
                self._maps[path] = mmap.mmap(fd, size)
                return self._maps[path]
            finally:
                os.close(fd)


def capacity(nbytes: int) -> int:
    """Bytes of the file for a snapshot: a little more than it has, because pickled objects grow from save to save."""
    return nbytes + nbytes // 64 + _SPARE_BYTES


def _allocate(path: str, fd: int, nbytes: int) -> None:
    """Allocate all of a file's memory now: a later write that finds no memory would end the process (SIGBUS)."""
    missing, available = nbytes - os.fstat(fd).st_blocks * 512, available_memory_bytes()
    if missing > available:
        raise StorageError(
            errno.ENOMEM, f"the replica needs {missing:,} more bytes of memory, and this host has {available:,}", path
        )
    os.posix_fallocate(fd, 0, nbytes)
