"""Writing one data file of one rank: values one after the other, each hashed in the pass that writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from stager.torch_api.storage.payload import Payload
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.layout.layout import Item, align

SEGMENT_BYTES = 64 << 20  # what one hash covers; the default of persistence.segment_bytes
_WRITE_BYTES = 4 << 20  # hashed and written while it is in the CPU cache
_JOIN_BYTES = 64 << 10  # below this, one copied buffer is cheaper than three small ones


@dataclass(frozen=True, slots=True)
class Written:
    """Where a rank wrote a value; the rank sends this to the coordinator.

    Attributes:
        file: name of the data file.
        item: the place in that file; ``item.file`` is 0, because files are numbered later.
        end: end of the item's span, which is the item and its padding.
        hashes: xxh3_128 of the segments of the span, hex.
    """

    file: str
    item: Item
    end: int
    hashes: tuple[str, ...]


class SpanWriter:
    """Appends values to a new file. Not thread-safe.

    Args:
        directory_fd: of the partial directory.
        directory: path of the partial directory, for messages.
        name: of the file, which must not exist.
    """

    def __init__(self, directory_fd: int, directory: str, name: str) -> None:
        self._name = name
        self._path = os.path.join(directory, name)
        self._end = 0  # of what was appended, in bytes
        self._batch: list[bytes | memoryview] = []
        self._batch_nbytes = 0
        self._owners: list[object] = []  # keep the memory of the batch alive
        with storage_errors("create", self._path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(name, flags, 0o666, dir_fd=directory_fd)

    def append(self, payload: Payload) -> Written:
        """Append a value and its padding.

        Raises:
            StorageError: a write failed.
        """
        start = self._end
        end = align(start + max(1, payload.nbytes))  # every span has a byte at least, so that it has a hash
        padding = bytes(end - start - payload.nbytes)
        if end - start <= _JOIN_BYTES:
            blob = b"".join((payload.head, payload.data, payload.tail, padding))
            hashes = [xxhash.xxh3_128_hexdigest(blob)]
            self._put(blob, None)
        else:
            hashes = list(self._segments(payload, padding))
        item = Item(
            payload.kind,
            0,
            start,
            payload.nbytes,
            start + len(payload.head),
            len(payload.data),
            payload.dtype,
            payload.shape,
            payload.stride,
        )
        return Written(self._name, item, end, tuple(hashes))

    def _segments(self, payload: Payload, padding: bytes) -> Iterator[str]:
        """Write a span, and yield the hash of each of its segments."""
        hasher, left = xxhash.xxh3_128(), SEGMENT_BYTES
        for piece in (payload.head, payload.data, payload.tail + padding):
            view, position = memoryview(piece), 0
            while position < len(view):
                chunk = view[position : position + min(left, _WRITE_BYTES)]
                hasher.update(chunk)
                self._put(chunk, payload.owner)
                position += len(chunk)
                left -= len(chunk)
                if left == 0:
                    yield hasher.hexdigest()
                    hasher, left = xxhash.xxh3_128(), SEGMENT_BYTES
        if left != SEGMENT_BYTES:
            yield hasher.hexdigest()

    def _put(self, piece: bytes | memoryview, owner: object) -> None:
        if self._batch_nbytes + len(piece) > _WRITE_BYTES or len(self._batch) >= files.IOV_MAX:
            self._flush()
        self._batch.append(piece)
        self._owners.append(owner)
        self._batch_nbytes += len(piece)
        self._end += len(piece)

    def _flush(self) -> None:
        with storage_errors("write", self._path):
            files.write_all(self._fd, self._batch, self._end - self._batch_nbytes)
        self._batch, self._owners, self._batch_nbytes = [], [], 0

    def finish(self, fsync: bool) -> None:
        """Write what is in the batch; with ``fsync``, sync the file."""
        self._flush()
        if fsync:
            with storage_errors("sync", self._path):
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
