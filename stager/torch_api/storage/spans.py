"""One data file of one rank: the bytes of each value, one value after the other, hashed in the pass that writes them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import xxhash

from stager.ranks.cutting import is_stored_raw
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.checkpoint.formats.object_pickle import pickle_object
from stager.workers.checkpoint.formats.torch_save import header_and_tail
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import align, contiguous_stride, is_dense
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.memory.pages import bytes_at

SEGMENT_BYTES = 64 << 20  # what one hash covers; the default of persistence.segment_bytes
_WRITE_BYTES = 4 << 20  # hashed and written while it is in the CPU cache
_JOIN_BYTES = 64 << 10  # below this, one copied buffer is cheaper than three small ones


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of one value, ready to be written.

    Attributes:
        item: where the value is in a file that begins with it.
        pieces: header, raw bytes and tail; the raw bytes are a view of the value's memory.
        owner: has to stay alive as long as ``pieces`` are used.
    """

    item: Item
    pieces: tuple[bytes | memoryview, ...]
    owner: object


def payload_of(value: torch.Tensor | io.BytesIO) -> Payload:
    """Make the payload of a value that a planner resolved. A tensor on a device is copied to the CPU."""
    if isinstance(value, io.BytesIO):
        return _object(value.getbuffer(), value)
    tensor = value.detach()
    # The bytes of a plain tensor are all of it. torch.save pickles every other tensor exactly.
    if type(tensor) not in PLAIN_TENSORS or tensor.is_meta or not is_stored_raw(tensor):
        blob = pickle_object(tensor if tensor.is_meta else tensor.cpu(), 0).blob
        return _object(blob, blob)
    tensor = tensor.resolve_conj().resolve_neg().cpu()
    shape, stride = tuple(tensor.shape), tensor.stride()
    if tensor.numel() == 0 or not is_dense(shape, stride):
        tensor, stride = tensor.contiguous(), contiguous_stride(shape)
    dtype = name_of(tensor.dtype)
    head, tail = header_and_tail(dtype, shape, stride)
    data = bytes_at(tensor.data_ptr(), tensor.nbytes)
    nbytes = len(head) + len(data) + len(tail)
    item = Item("tensor", 0, 0, nbytes, len(head), len(data), dtype, shape, stride)
    return Payload(item, (head, data, tail), tensor)


def _object(data: bytes | memoryview, owner: object) -> Payload:
    return Payload(Item("object", 0, 0, len(data), 0, len(data), "", (), ()), (data,), owner)


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
        self._end = 0  # of the last span, in bytes
        self._small = bytearray()  # small pieces, which are written together
        self._num_written = 0  # bytes
        with storage_errors("create", self._path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(name, flags, 0o666, dir_fd=directory_fd)

    def append(self, payload: Payload) -> Written:
        """Append a value and its padding.

        Raises:
            StorageError: a write failed.
        """
        start, relative = self._end, payload.item
        end = align(start + max(1, relative.nbytes))  # every span has a byte at least, so that it has a hash
        pieces = (*payload.pieces, bytes(end - start - relative.nbytes))
        if end - start <= _JOIN_BYTES:
            pieces = (b"".join(pieces),)
        hashes = tuple(self._write_segments(pieces))
        self._end = end
        item = replace(relative, offset=start, data_offset=start + relative.data_offset)
        return Written(self._name, item, end, hashes)

    def _write_segments(self, pieces: tuple[bytes | memoryview, ...]) -> Iterator[str]:
        """Write a span, and yield the hash of each of its segments."""
        hasher, left = xxhash.xxh3_128(), SEGMENT_BYTES
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                chunk = rest[: min(left, _WRITE_BYTES)]
                hasher.update(chunk)
                self._put(chunk)
                rest, left = rest[len(chunk) :], left - len(chunk)
                if left == 0:
                    yield hasher.hexdigest()
                    hasher, left = xxhash.xxh3_128(), SEGMENT_BYTES
        if left != SEGMENT_BYTES:
            yield hasher.hexdigest()

    def _put(self, chunk: memoryview) -> None:
        if len(chunk) <= _JOIN_BYTES:
            self._small += chunk
            chunk = chunk[:0]
        if chunk or len(self._small) >= _WRITE_BYTES:
            self._flush(chunk)

    def _flush(self, chunk: bytes | memoryview = b"") -> None:
        """Write the small pieces, and ``chunk`` behind them."""
        with storage_errors("write", self._path):
            files.write_all(self._fd, [memoryview(self._small), chunk], self._num_written)
        self._num_written += len(self._small) + len(chunk)
        self._small = bytearray()

    def finish(self, fsync: bool) -> None:
        """Write what is left; with ``fsync``, sync the file."""
        self._flush()
        if fsync:
            with storage_errors("sync", self._path):
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
