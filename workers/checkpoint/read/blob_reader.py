"""Read a committed checkpoint: bytes in parallel, each segment checked against its hash.

The bytes go straight into memory that the caller owns (``preadv``). Nothing is unpickled here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import xxhash

from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import num_segments
from stager.workers.checkpoint.layout.structure import describe
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.pages import bytes_at

if TYPE_CHECKING:
    import numpy as np

GROUP_BYTES = 2 << 20  # of small items: one read, which stays in the CPU's cache until it is hashed
CHUNK_BYTES = 1 << 20  # of large items, for the same reason
_MANY_ITEMS = 128  # in one group


def _new_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return memory that is not zeroed, unlike a bytearray."""
    import numpy as np  # here: the workers, which only write, start without it

    return np.empty(nbytes, np.uint8)


class Sink(Protocol):
    """Takes the raw bytes of an item piece by piece, from several threads, in any order."""

    def take(self, nbytes: int) -> memoryview:
        """Return memory for the next bytes that this thread reads, at most ``CHUNK_BYTES``."""

    def put(self, start: int, nbytes: int) -> None:
        """Take what this thread has read into its memory: the item's raw bytes from ``start`` on."""


@dataclass(slots=True)  # not frozen, which takes twice as long to make, and there can be 200,000
class Wanted:
    """An item to read, and where its raw bytes go: memory, its address, or a sink. None: nowhere, only check them.

    A sink's item is larger than ``GROUP_BYTES``, with what stands around its bytes.
    """

    index: int
    target: memoryview | int | Sink | None


_OnError = Callable[[CorruptCheckpointError], None]


def _raise(error: CorruptCheckpointError) -> None:
    raise error


class BlobReader(AbstractContextManager["BlobReader"]):
    """The data files of one checkpoint, opened once. Checks their sizes.

    Args:
        path: the checkpoint's directory.
        num_threads: how many reads run at a time.
        progress: called from the reading threads with the number of bytes just read.

    Raises:
        CorruptCheckpointError: a file is missing, or has another size.
        StorageError
    """

    def __init__(
        self, path: str, manifest: Manifest, num_threads: int, progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._num_threads = num_threads
        self._progress = progress
        self._items = manifest.layout.items
        self._starts, self._ends = manifest.layout.starts(), manifest.layout.ends()
        self._fds: list[int] = []
        try:
            for file, spec in enumerate(manifest.layout.files):
                self._open(self.file_path(file), spec.nbytes)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, nbytes: int) -> None:
        with storage_errors("open", path):
            try:
                self._fds.append(open_regular(path))
            except FileNotFoundError as error:
                raise CorruptCheckpointError(path, "is missing") from error
            actual = os.fstat(self._fds[-1]).st_size
        if actual != nbytes:
            raise CorruptCheckpointError(path, f"is {actual} bytes long, should be {nbytes}")

    def file_path(self, file: int) -> str:
        """Return the path of a data file, given its number."""
        return os.path.join(self._path, self._manifest.layout.files[file].name)

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, wanted: Sequence[Wanted], on_error: _OnError = _raise) -> None:
        """Read and check items. Each target must be exactly ``data_nbytes`` long.

        Args:
            wanted: in file order for speed.
            on_error: called for each damaged item, from any thread; without it the first one is raised.

        Raises:
            CorruptCheckpointError: a hash does not match, or a file ends early.
            StorageError: a read failed.
        """

        def do(reads: list[partial[None]]) -> None:
            for read in reads:
                try:
                    read()
                except CorruptCheckpointError as error:
                    on_error(error)

        units = self._reads(wanted, on_error)
        if self._num_threads == 1 or len(units) < 2:
            for unit in units:
                do(unit)
            return
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="stager-read") as executor:
            futures = [executor.submit(do, unit) for unit in units]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _reads(self, wanted: Sequence[Wanted], on_error: _OnError) -> list[list[partial[None]]]:
        """Return lists of reads. One thread does a whole list: a group of items, or one segment of a large item.

        Groups of many small items share one list. They are work for Python, of which one thread at a time does any, so
        several threads would only take turns.
        """
        layout = self._manifest.layout
        many: list[partial[None]] = []
        others: list[list[partial[None]]] = []
        for group in self._groups(wanted):
            span = self._ends[group[0].index] - self._starts[group[0].index]
            if span > GROUP_BYTES:
                numbers = range(num_segments(span, layout.segment_bytes))
                others += [[partial(self._read_segment, group[0], number)] for number in numbers]
            elif len(group) > _MANY_ITEMS:
                many.append(partial(self._read_group, group, on_error))
            else:
                others.append([partial(self._read_group, group, on_error)])
        return [many, *others] if many else others

    def _groups(self, wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
        """Iterate over groups of neighbours in one file, up to ``GROUP_BYTES`` together. A larger item is alone."""
        files, starts, ends = self._items.file, self._starts, self._ends
        group: list[Wanted] = []
        start = last_file = last_end = -1
        for want in wanted:
            index = want.index
            file, offset, end = files[index], starts[index], ends[index]
            if offset == last_end and file == last_file and end - start <= GROUP_BYTES:
                group.append(want)
            else:
                if group:
                    yield group
                group, start = [want], offset
            last_file, last_end = file, end
        if group:
            yield group

    def _read_group(self, group: Sequence[Wanted], on_error: _OnError) -> None:
        starts, ends, hashes = self._starts, self._ends, self._manifest.hashes
        step, (offsets, sizes) = self._manifest.layout.segment_bytes, (self._items.data_offset, self._items.data_nbytes)
        digest, copy = xxhash.xxh3_128_hexdigest, ctypes.memmove
        start = starts[group[0].index]
        memory = _new_memory(ends[group[-1].index] - start)
        buffer, address = memory.data, memory.ctypes.data
        self._pread(self._items.file[group[0].index], [buffer], start)
        for want in group:
            index, target = want.index, want.target
            span = buffer[starts[index] - start : ends[index] - start]
            if len(span) > step or digest(span) != hashes[index][0]:  # rare: several segments, or damage
                try:
                    for number in range(num_segments(len(span), step)):
                        self._check(index, number, digest(span[number * step : (number + 1) * step]))
                except CorruptCheckpointError as error:
                    on_error(error)
                    continue
            if type(target) is int:
                copy(target, address + offsets[index] - start, sizes[index])
            elif isinstance(target, memoryview):
                target[:] = buffer[offsets[index] - start : offsets[index] - start + sizes[index]]
        self._progress(len(buffer))

    def _read_segment(self, want: Wanted, number: int) -> None:
        """Read one segment of an item, its raw bytes straight into the target."""
        item, end = self._manifest.layout.items[want.index], self._ends[want.index]
        target = bytes_at(want.target, item.data_nbytes) if isinstance(want.target, int) else want.target
        step = self._manifest.layout.segment_bytes
        start = item.offset + number * step
        stop = min(start + step, end)
        scratch = _new_memory(min(CHUNK_BYTES, stop - start)).data
        hasher = xxhash.xxh3_128()
        for low in range(start, stop, CHUNK_BYTES):
            high = min(low + CHUNK_BYTES, stop)
            for piece in self._pieces(item, low, high, target, scratch):
                hasher.update(piece)
            if target is not None and not isinstance(target, memoryview):
                first, last = _raw(item, low, high)
                target.put(first - item.data_offset, last - first)
        self._check(want.index, number, hasher.hexdigest())
        self._progress(stop - start)

    def _pieces(
        self, item: Item, low: int, high: int, target: memoryview | Sink | None, scratch: memoryview
    ) -> list[memoryview]:
        """Read bytes ``low`` to ``high`` of the file: raw bytes into the target, the others into ``scratch``."""
        data_low, data_high = _raw(item, low, high)
        before, after = data_low - low, high - data_high
        pieces = [scratch[: high - low]]
        if target is not None:
            if isinstance(target, memoryview):
                raw = target[data_low - item.data_offset : data_high - item.data_offset]
            else:
                raw = target.take(data_high - data_low)
            pieces = [scratch[:before], raw, scratch[before : before + after]]
        self._pread(item.file, pieces, low)
        return pieces

    def _pread(self, file: int, buffers: list[memoryview], offset: int) -> None:
        pending = [buffer for buffer in buffers if len(buffer)]  # a span of safetensors may have no bytes
        with storage_errors("read", self.file_path(file)):
            while pending:
                count = os.preadv(self._fds[file], pending, offset)
                if count == 0:
                    raise CorruptCheckpointError(self.file_path(file), f"is cut short: it ends at byte {offset}")
                offset += count
                while pending and count >= len(pending[0]):
                    count -= len(pending.pop(0))
                if count:
                    pending[0] = pending[0][count:]

    def _check(self, index: int, number: int, actual: str) -> None:
        if actual == self._manifest.hashes[index][number]:
            return
        item = self._manifest.layout.items[index]
        start = item.offset + number * self._manifest.layout.segment_bytes
        names = [describe(path) for path, leaf in self._manifest.paths() if leaf == index]
        what = ", ".join(names[:3]) or "what stands around the values"
        raise CorruptCheckpointError(
            self.file_path(item.file),
            f"the bytes from {start} on are damaged ({what}): their xxh3 hash does not match",
        )


def _raw(item: Item, low: int, high: int) -> tuple[int, int]:
    """Return which of the bytes ``low`` to ``high`` of the file are raw bytes of the item: (start, end)."""
    start = min(max(low, item.data_offset), high)
    return start, max(min(high, item.data_offset + item.data_nbytes), start)
