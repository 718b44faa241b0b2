"""One file that is being written: hashed on the way, synced, and visible under its name when all of it is there."""

from __future__ import annotations

import io
import os
import secrets
from contextlib import suppress
from types import TracebackType
from typing import Any

import xxhash
from typing_extensions import Self

from stager.integrations.torch_checkpointing_parts.receipt import (
    SEGMENT_BYTES,
    FileReceipt,
    receipt_path,
    unfinished_path,
)
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import UsageError
from stager.workers.faults import point

_BUFFER_BYTES = 4 << 20  # torch.save writes many small pieces
_HASH_BYTES = 1 << 20  # hashed while it is in the CPU cache


class SegmentHasher:
    """Hashes a stream, as a whole and by segments.

    Attributes:
        nbytes: so much was added.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._hashes: list[str] = []
        self._whole, self._segment = xxhash.xxh3_128(), xxhash.xxh3_128()

    def add(self, data: memoryview) -> None:
        """Add bytes."""
        while data:
            piece = data[: min(_HASH_BYTES, SEGMENT_BYTES - self.nbytes % SEGMENT_BYTES)]
            self._whole.update(piece)
            self._segment.update(piece)
            self.nbytes += len(piece)
            data = data[len(piece) :]
            if self.nbytes % SEGMENT_BYTES == 0:
                self._hashes.append(self._segment.hexdigest())
                self._segment.reset()

    def receipt(self, mtime_ns: int, run: str, writer: str = "") -> FileReceipt:
        """Return what was hashed. A file without bytes has one segment."""
        rest = [self._segment.hexdigest()] if self.nbytes % SEGMENT_BYTES or not self._hashes else []
        return FileReceipt(self.nbytes, mtime_ns, self._whole.hexdigest(), (*self._hashes, *rest), run, writer)


class WriteStream(io.RawIOBase):
    """What ``Storage.stream_write()`` returns; a context manager, as those of torch_checkpointing's own storage.

    If the ``with`` block raises, nothing appears under the name.

    Raises:
        StorageError: the file cannot be written; by every method.
    """

    def __init__(self, path: str, fsync: bool, run: str, writer: str) -> None:
        self._path = path
        self._fsync = fsync
        self._run, self._writer = run, writer
        self._unfinished = unfinished_path(path, secrets.token_hex(8))
        self._file: Any = None
        self._hasher = SegmentHasher()

    def __enter__(self) -> Self:
        with storage_errors("write", self._path):
            point("part.begin")
            self._file = open(self._unfinished, "xb", buffering=_BUFFER_BYTES)
        return self

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``, any buffer of contiguous bytes; returns how many there are."""
        if self._file is None:
            raise UsageError(f"{self._path}: is written to outside of its with block")
        view = memoryview(data).cast("B")
        point("part.write")
        with storage_errors("write", self._path):
            self._file.write(view)
        self._hasher.add(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: what is written is durable when the ``with`` block ends."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        try:
            with storage_errors("write", self._path):
                file.close() if error is not None else self._publish(file)
        finally:
            with suppress(OSError):  # it has its name now
                os.unlink(self._unfinished)
            self.close()

    def _publish(self, file: Any) -> None:
        """Give the file its name, and leave the receipt.

        1. Sync the file.
        2. Write the receipt, which replaces an older one. Before the rename: if this save fails in between, its file would
           have no receipt, and be taken for that of a callback by the next save.
        3. Rename the file. Until then, the receipt does not fit what may be there, by size and time.
        """
        with file:
            file.flush()
            point("part.written")
            if self._fsync:
                os.fsync(file.fileno())
            stat = os.fstat(file.fileno())
        point("part.synced")
        receipt = self._hasher.receipt(stat.st_mtime_ns, self._run, self._writer)
        directory, name = os.path.split(receipt_path(self._path))
        directory_fd = files.open_directory(directory)
        try:
            files.write_atomically(directory_fd, directory, name, receipt.to_bytes(), fsync=False)
        finally:
            os.close(directory_fd)
        point("part.receipt")
        os.rename(self._unfinished, self._path)


def hash_file(path: str, run: str) -> FileReceipt:
    """Return what :class:`WriteStream` would have left for a file that another program wrote."""
    hasher = SegmentHasher()
    with storage_errors("read", path), open(files.open_regular(path), "rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := file.readinto(buffer):
            hasher.add(buffer[:count])
    return hasher.receipt(stat.st_mtime_ns, run)
