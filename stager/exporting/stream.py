"""Items of a checkpoint byte by byte: little memory however large they are, each hash checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import xxhash

from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.layout import num_segments
from stager.workers.errors import CorruptCheckpointError


class ItemStream:
    """The data files of one checkpoint, opened once.

    Args:
        path, manifest: the checkpoint.
        chunk_bytes: how much is in memory at a time.
        progress: called with the number of bytes just read.
    """

    def __init__(self, path: str, manifest: Manifest, chunk_bytes: int, progress: Callable[[int], None]) -> None:
        self._manifest = manifest
        self._ends = [end for _, _, end in manifest.layout.spans()]
        self._paths = [os.path.join(path, spec.name) for spec in manifest.layout.files]
        self._buffer = memoryview(bytearray(chunk_bytes))
        self._progress = progress
        self._fds: list[int] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for file, spec in zip(self._paths, manifest.layout.files, strict=True):
                self._fds.append(_open(file, spec.nbytes))
            on_error.pop_all()

    def data(self, index: int) -> Iterator[memoryview]:
        """The raw bytes of an item, in order. What was yielded is valid until the next one is asked for.

        Raises:
            CorruptCheckpointError: a hash does not match, perhaps after the bytes it covers were yielded.
            StorageError
        """
        item, step = self._manifest.layout.items[index], self._manifest.layout.segment_bytes
        low, high = item.data_offset, item.data_offset + item.data_nbytes
        for number in range(num_segments(self._ends[index] - item.offset, step)):
            start = item.offset + number * step
            stop = min(start + step, self._ends[index])
            hasher = xxhash.xxh3_128()
            for position in range(start, stop, len(self._buffer)):
                chunk = self._buffer[: min(len(self._buffer), stop - position)]
                self._read(item.file, chunk, position)
                hasher.update(chunk)
                data = chunk[min(max(low - position, 0), len(chunk)) : min(max(high - position, 0), len(chunk))]
                if data:
                    yield data
            if hasher.hexdigest() != self._manifest.hashes[index][number]:
                raise CorruptCheckpointError(
                    self._paths[item.file], f"the bytes from {start} on are damaged: their xxh3 hash does not match"
                )
            self._progress(stop - start)

    def _read(self, file: int, chunk: memoryview, position: int) -> None:
        with storage_errors("read", self._paths[file]):
            while chunk:
                count = os.preadv(self._fds[file], [chunk], position)
                if count == 0:
                    raise CorruptCheckpointError(self._paths[file], f"is cut short: it ends at byte {position}")
                chunk, position = chunk[count:], position + count

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _open(path: str, nbytes: int) -> int:
    with storage_errors("open", path):
        try:
            fd = open_regular(path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(path, "is missing") from error
    actual = os.fstat(fd).st_size
    if actual != nbytes:
        os.close(fd)
        raise CorruptCheckpointError(path, f"is {actual} bytes long, should be {nbytes}")
    return fd
