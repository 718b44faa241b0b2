"""Writing the files of exported weights: several threads copy groups of tensors, also into one file at a time.

Threads, not processes: reading, hashing, converting and writing release the interpreter's lock, and a process would first
have to import torch. docs/benchmarks.md has the figures.

1. Tensors that follow each other in a file form a group, of a few MiB at least.
2. A thread takes the next group. The first group of a file creates it.
3. The last group of a file syncs and closes it, while other threads copy those of the next file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack

from stager.exporting.shards import Shard
from stager.exporting.tensor_copier import TensorCopier
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.posix.write_back import start_write_back

_GROUP_BYTES = 32 << 20


def write_shards(shards: Sequence[Shard], directory: str, copier: TensorCopier, num_threads: int) -> None:
    """Write and sync files of weights.

    Args:
        directory: has none of them yet.
        copier: copies the tensors.
        num_threads: how many groups are copied at a time.

    Raises:
        CorruptCheckpointError, StorageError, MemoryBudgetError, UnstageableError: as copying does; files may be left.
    """
    with ExitStack() as open_files:
        executor = ThreadPoolExecutor(num_threads, thread_name_prefix="stager-export")
        try:
            futures = []
            for shard in shards:
                groups = list(_groups(shard))
                file = _ShardFile(shard, directory, copier, len(groups))
                open_files.callback(file.close)
                futures += [executor.submit(file.write, group) for group in groups]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            executor.shutdown(cancel_futures=True)  # after an error, or Ctrl-C: groups that no thread has begun
        for future in futures:
            if not future.cancelled():
                future.result()


def _groups(shard: Shard) -> Iterator[range]:
    """Yield the indices of the tensors of each group."""
    start = nbytes = 0
    for index, item in enumerate(shard.items):
        nbytes += item.nbytes
        if nbytes >= _GROUP_BYTES or index + 1 == len(shard.items):
            yield range(start, index + 1)
            start, nbytes = index + 1, 0


class _ShardFile:
    """A file that several threads write."""

    def __init__(self, shard: Shard, directory: str, copier: TensorCopier, num_groups: int) -> None:
        self._shard = shard
        self._path = os.path.join(directory, shard.name)
        self._copier = copier
        self._left = num_groups
        self._lock = threading.Lock()  # of what is below, and of how many groups are left
        self._fd = -1

    def write(self, group: range) -> None:
        """Copy a group of tensors. Sync and close the file if it was the last."""
        items = [self._shard.items[index] for index in group]
        with storage_errors("write", self._path):
            fd = self._opened()
            for index, item in zip(group, items, strict=True):
                self._copier.copy(self._shard.weights[index].number, fd, item)
            start_write_back(fd, items[0].offset, sum(item.nbytes for item in items))
            with self._lock:
                self._left -= 1
                is_last = not self._left
            if is_last:
                os.fsync(fd)
                self.close()

    def _opened(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._fd, self._shard.nbytes)
                files.write_all(self._fd, [self._shard.header], 0)
            return self._fd

    def close(self) -> None:
        """Close the file, if it is open."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
