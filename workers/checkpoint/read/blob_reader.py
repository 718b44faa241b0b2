"""Read a committed checkpoint: bytes in parallel, each segment checked against its hash.

The bytes go straight into memory that the caller owns (``preadv``). Nothing is unpickled here.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeAlias

import xxhash

from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import num_segments
from stager.workers.checkpoint.layout.structure import describe
from stager.workers.checkpoint.read.scatter import scatter
from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.pages import bytes_at

GROUP_BYTES = 2 << 20  # of small items: one read, which stays in the CPU's cache until it is hashed
CHUNK_BYTES = 1 << 20  # of large items that go elsewhere: to a sink, or nowhere
_MANY_ITEMS = 128  # in one group


class Sink(Protocol):
    """Takes the raw bytes of an item piece by piece, from several threads, in any order."""

    def take(self, nbytes: int) -> memoryview:
        """Return memory for the next bytes that this thread reads, at most ``CHUNK_BYTES``."""

    def put(self, start: int, nbytes: int) -> None:
        """Take what this thread has read into its memory: the item's raw bytes from ``start`` on."""


Target: TypeAlias = memoryview | int | Sink
"""Where the raw bytes of an item go: memory, its address, or a sink.

A sink's item is larger than ``GROUP_BYTES``, with what stands around its bytes.
"""

_OnError = Callable[[CorruptCheckpointError], None]


def _raise(error: CorruptCheckpointError) -> None:
    raise error


class _Scratch(threading.local):
    """Memory of each reading thread. It is kept from read to read, because new pages take as long as reading into them."""

    def __init__(self) -> None:
        self._memory: Any = None

    def take(self, nbytes: int) -> Any:
        """Return an array of bytes, which is the thread's until it takes the next."""
        import numpy as np  # here: the workers, which only write, start without it

        if self._memory is None or len(self._memory) < nbytes:
            self._memory = np.empty(nbytes, np.uint8)  # not zeroed, unlike a bytearray
        return self._memory[:nbytes]


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
        self._num_threads = max(num_threads, storage_of(path).reads_at_once)
        self._progress = progress
        self._items = manifest.layout.items
        self._starts, self._ends = manifest.layout.starts(), manifest.layout.ends()
        self._scratch = _Scratch()
        self._files: list[DataFile] = []
        try:
            for file, spec in enumerate(manifest.layout.files):
                self._open(file, spec.nbytes)
        except BaseException:
            self.close()
            raise

    def _open(self, file: int, nbytes: int) -> None:
        path = self.file_path(file)
        with storage_errors("open", path):
            try:
                self._files.append(storage_of(self._path).open_data(self._path, self._manifest, file))
            except FileNotFoundError as error:
                raise CorruptCheckpointError(path, "is missing") from error
        actual = self._files[-1].nbytes
        if actual != nbytes:
            raise CorruptCheckpointError(path, f"is {actual} bytes long, should be {nbytes}")

    def file_path(self, file: int) -> str:
        """Return the path of a data file, given its number."""
        return os.path.join(self._path, self._manifest.layout.files[file].name)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(
        self, indices: Sequence[int], targets: Sequence[Target] | None = None, on_error: _OnError = _raise
    ) -> None:
        """Read and check items.

        Args:
            indices: of the items; in file order for speed.
            targets: of each item, exactly ``data_nbytes`` long. None: the bytes are only checked.
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

        units = self._reads(indices, targets, on_error)
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

    def _reads(
        self, indices: Sequence[int], targets: Sequence[Target] | None, on_error: _OnError
    ) -> list[list[partial[None]]]:
        """Return lists of reads. One thread does a whole list: a group of items, or one segment of a large item.

        Groups of many small items share one list. They are work for Python, of which one thread at a time does any, so
        several threads would only take turns.
        """
        step = self._manifest.layout.segment_bytes
        many: list[partial[None]] = []
        others: list[list[partial[None]]] = []
        for at, group in self._groups(indices):
            places = None if targets is None else targets[at : at + len(group)]
            span = self._ends[group[0]] - self._starts[group[0]]
            if span > GROUP_BYTES:
                target = None if places is None else places[0]
                numbers = range(num_segments(span, step))
                others += [[partial(self._read_segment, group[0], target, number)] for number in numbers]
            elif len(group) > _MANY_ITEMS:
                many.append(partial(self._read_group, group, places, on_error))
            else:
                others.append([partial(self._read_group, group, places, on_error)])
        return [many, *others] if many else others

    def _groups(self, indices: Sequence[int]) -> Iterator[tuple[int, range]]:
        """Iterate over groups of neighbours in one file, up to ``GROUP_BYTES`` together. A larger item is alone.

        Yields:
            Where in ``indices`` the group begins, and its items.
        """
        import numpy as np  # here: as above

        if not len(indices):
            return
        column = np.array(indices, np.int64)
        files = np.frombuffer(self._items.file, np.int64)[column]
        run_ends = np.flatnonzero((np.diff(column) != 1) | (np.diff(files) != 0)) + 1
        at = 0
        for run_end in (*run_ends.tolist(), len(column)):
            first = int(column[at])
            behind = first + run_end - at
            while first < behind:
                fitting = bisect_right(self._ends, self._starts[first] + GROUP_BYTES, first + 1, behind)
                yield at, range(first, fitting)
                at, first = at + fitting - first, fitting

    def _read_group(self, group: range, targets: Sequence[Target] | None, on_error: _OnError) -> None:
        step, digest, chosen = (
            self._manifest.layout.segment_bytes,
            xxhash.xxh3_128_hexdigest,
            slice(group.start, group.stop),
        )
        start = self._starts[group.start]
        spans = [(low - start, end - start) for low, end in zip(self._starts[chosen], self._ends[chosen], strict=True)]
        memory = self._scratch.take(spans[-1][1])
        buffer = memory.data
        self._pread(self._items.file[group.start], buffer, start)
        actual = [(digest(buffer[low:end]),) for low, end in spans]
        damaged = set()
        if tuple(actual) != self._manifest.hashes[chosen]:  # rare: damage, or several segments
            for number, (index, span) in enumerate(zip(group, spans, strict=True)):
                try:
                    for segment, low in enumerate(range(span[0], max(span[1], span[0] + 1), step)):
                        self._check(index, segment, digest(buffer[low : min(low + step, span[1])]))
                except CorruptCheckpointError as error:
                    on_error(error)
                    damaged.add(number)
        if targets is not None:
            self._scatter(memory, group, start, targets, damaged)
        self._progress(len(buffer))

    def _scatter(
        self, memory: Any, group: range, start: int, targets: Sequence[Target], damaged: Collection[int]
    ) -> None:
        """Copy the raw bytes of a group to their targets.

        Args:
            memory: what was read, from byte ``start`` of the file on.
            damaged: which of the group's items are not copied.
        """
        import numpy as np  # here: as above

        chosen = slice(group.start, group.stop)
        offsets, nbytes = (
            np.frombuffer(column[chosen], np.int64) for column in (self._items.data_offset, self._items.data_nbytes)
        )
        if damaged:
            whole = [number for number in range(len(group)) if number not in damaged]
            offsets, nbytes, targets = offsets[whole], nbytes[whole], [targets[number] for number in whole]
        scatter(memory, offsets - start, nbytes, targets)

    def _read_segment(self, index: int, target: Target | None, number: int) -> None:
        """Read one segment of an item, its raw bytes straight into the target."""
        item = self._items[index]
        if isinstance(target, int):
            target = bytes_at(target, item.data_nbytes)
        start = item.offset + number * self._manifest.layout.segment_bytes
        stop = min(start + self._manifest.layout.segment_bytes, self._ends[index])
        read_into, hasher = self._files[item.file].read_into, xxhash.xxh3_128()
        # Few lines for each piece: while one thread holds the GIL for them, the others wait.
        with storage_errors("read", self.file_path(item.file)):
            for at, piece, sink in self._pieces(item, start, stop, target):
                count = read_into(piece, at)
                if count != len(piece):
                    self._pread(item.file, piece[count:], at + count)
                hasher.update(piece)
                if sink is not None:
                    sink.put(at - item.data_offset, len(piece))
        self._check(index, number, hasher.hexdigest())
        self._progress(stop - start)

    def _pieces(
        self, item: Item, start: int, stop: int, target: memoryview | Sink | None
    ) -> Iterator[tuple[int, memoryview, Sink | None]]:
        """Iterate over the pieces of bytes ``start`` to ``stop`` of the file.

        Yields:
            Where a piece begins, the memory for it, and the sink that takes it from there.
        """
        scratch = self._scratch.take(min(CHUNK_BYTES, stop - start)).data
        data_start, data_stop = (start, start) if target is None else _raw(item, start, stop)
        for low in range(start, data_start, CHUNK_BYTES):
            yield low, scratch[: min(CHUNK_BYTES, data_start - low)], None
        if isinstance(target, memoryview):
            raw = target[data_start - item.data_offset : data_stop - item.data_offset]
            step = self._files[item.file].piece_bytes
            for low in range(0, len(raw), step):
                yield data_start + low, raw[low : low + step], None
        elif target is not None:
            for low in range(data_start, data_stop, CHUNK_BYTES):
                yield low, target.take(min(CHUNK_BYTES, data_stop - low)), target
        for low in range(data_stop, stop, CHUNK_BYTES):
            yield low, scratch[: min(CHUNK_BYTES, stop - low)], None

    def _pread(self, file: int, buffer: memoryview, offset: int) -> None:
        with storage_errors("read", self.file_path(file)):
            while buffer:
                count = self._files[file].read_into(buffer, offset)
                if count == 0:
                    raise CorruptCheckpointError(self.file_path(file), f"is cut short: it ends at byte {offset}")
                buffer, offset = buffer[count:], offset + count

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
