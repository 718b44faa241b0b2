"""Reading a committed checkpoint: bytes in parallel, each segment checked against its hash.

Positioned reads (``preadv``) into memory that the caller owns; nothing is unpickled here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import xxhash

from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.layout import Item, num_segments
from stager.workers.checkpoint.layout.structure import describe
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.pages import bytes_at

if TYPE_CHECKING:
    import numpy as np

_GROUP_BYTES = 2 << 20  # of small items: one read, and it stays in the cache until it was hashed
_CHUNK_BYTES = 1 << 20  # of large ones, for the same reason
_MANY_ITEMS = 128  # in one group


def _new_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Not zeroed, as a bytearray is."""
    import numpy as np  # here: the workers, which only write, start without it

    return np.empty(nbytes, np.uint8)


@dataclass(slots=True)  # not frozen, which takes twice as long to make, and there can be 200,000
class Wanted:
    """An item to read, and where its raw bytes go: memory, or its address (``None``: nowhere, check them only)."""

    index: int
    target: memoryview | int | None


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One read: whole items that follow each other in a file, or one segment of an item (``number``)."""

    wanted: Sequence[Wanted]
    number: int | None = None


def _open(path: str) -> int:
    with storage_errors("open", path):
        try:
            return open_regular(path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(path, "is missing") from error


class BlobReader:
    """The data files of one checkpoint, opened once.

    Args:
        path: the checkpoint's directory.
        manifest: its manifest.
        num_threads: how many reads run at a time.
        progress: called from the reading threads with the number of bytes just read.
    """

    def __init__(
        self, path: str, manifest: Manifest, num_threads: int, progress: Callable[[int], None] | None = None
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._num_threads = num_threads
        self._progress = progress or (lambda nbytes: None)
        self._ends = manifest.layout.ends()
        self._fds: list[int] = []
        try:
            for index, spec in enumerate(manifest.layout.files):
                self._fds.append(_open(self.file_path(index)))
                self._check_size(index, spec.nbytes)
        except BaseException:
            self.close()
            raise

    def _check_size(self, file: int, nbytes: int) -> None:
        with storage_errors("look at", self.file_path(file)):
            actual = os.fstat(self._fds[file]).st_size
        if actual != nbytes:
            raise CorruptCheckpointError(self.file_path(file), f"is {actual} bytes long, should be {nbytes}")

    def file_path(self, file: int) -> str:
        return os.path.join(self._path, self._manifest.layout.files[file].name)

    def read(self, wanted: Sequence[Wanted], on_error: Callable[[CorruptCheckpointError], None] | None = None) -> None:
        """Read and check items. Each target must be exactly ``data_nbytes`` long.

        Args:
            wanted: in file order for speed.
            on_error: called for each damaged item; without it the first one is raised.

        Raises:
            CorruptCheckpointError: a hash does not match, or a file ends early.
            StorageError: a read failed.
        """
        stretches = self._stretches(wanted)
        # Many small items are work for Python, of which one thread at a time does any: more would only take turns.
        shared = [stretch for stretch in stretches if len(stretch.wanted) <= _MANY_ITEMS]
        if self._num_threads == 1 or len(shared) < 2:
            for stretch in stretches:
                self._read_stretch(stretch, on_error)
            return
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="stager-read") as executor:
            futures = [executor.submit(self._read_stretch, stretch, on_error) for stretch in shared]
            try:
                for stretch in stretches:
                    if len(stretch.wanted) > _MANY_ITEMS:
                        self._read_stretch(stretch, on_error)
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _stretches(self, wanted: Sequence[Wanted]) -> list[_Stretch]:
        """Neighbours in one file, up to ``_GROUP_BYTES`` together; a large item by its segments, for several threads."""
        items, ends = self._manifest.layout.items, self._ends
        stretches: list[_Stretch] = []
        group: list[Wanted] = []
        nbytes = 0
        following = (-1, -1)
        for want in wanted:
            item, end = items[want.index], ends[want.index]
            span = end - item.offset
            if group and ((item.file, item.offset) != following or nbytes + span > _GROUP_BYTES):
                stretches.append(_Stretch(group))
                group, nbytes = [], 0
            if span > _GROUP_BYTES:
                stretches += self._segments_of(want, span)
                continue
            group.append(want)
            nbytes += span
            following = (item.file, end)
        return [*stretches, _Stretch(group)] if group else stretches

    def _segments_of(self, want: Wanted, span: int) -> list[_Stretch]:
        target = want.target
        if isinstance(target, int):
            target = bytes_at(target, self._manifest.layout.items[want.index].data_nbytes)
        with_memory = [Wanted(want.index, target)]
        numbers = range(num_segments(span, self._manifest.layout.segment_bytes))
        return [_Stretch(with_memory, number) for number in numbers]

    def _read_stretch(self, stretch: _Stretch, on_error: Callable[[CorruptCheckpointError], None] | None) -> None:
        if stretch.number is None:
            self._read_group(stretch.wanted, on_error)
        else:
            self._guarded(partial(self._read_segment, stretch.wanted[0], stretch.number), on_error)

    def _read_group(self, group: Sequence[Wanted], on_error: Callable[[CorruptCheckpointError], None] | None) -> None:
        layout, ends, hashes = self._manifest.layout, self._ends, self._manifest.hashes
        items, step = layout.items, layout.segment_bytes
        digest, copy = xxhash.xxh3_128_hexdigest, ctypes.memmove
        start = items[group[0].index].offset
        memory = _new_memory(ends[group[-1].index] - start)
        buffer, address = memory.data, memory.ctypes.data
        self._pread(items[group[0].index].file, [buffer], start)
        for want in group:
            index, target = want.index, want.target
            item = items[index]
            span = buffer[item.offset - start : ends[index] - start]
            if len(span) > step or digest(span) != hashes[index][0]:  # the first is rare
                try:
                    self._check_span(index, span)
                except CorruptCheckpointError as error:
                    if on_error is None:
                        raise
                    on_error(error)
                    continue
            if type(target) is int:
                copy(target, address + item.data_offset - start, item.data_nbytes)
            elif isinstance(target, memoryview):
                target[:] = buffer[item.data_offset - start : item.data_offset - start + item.data_nbytes]
        self._progress(len(buffer))

    @staticmethod
    def _guarded(read: Callable[[], None], on_error: Callable[[CorruptCheckpointError], None] | None) -> None:
        try:
            read()
        except CorruptCheckpointError as error:
            if on_error is None:
                raise
            on_error(error)

    def _check_span(self, index: int, span: memoryview) -> None:
        step = self._manifest.layout.segment_bytes
        for number in range(num_segments(len(span), step)):
            segment = span[number * step : (number + 1) * step]
            self._check(index, number, xxhash.xxh3_128_hexdigest(segment))

    def _read_segment(self, want: Wanted, number: int) -> None:
        """One segment of an item, its raw bytes straight into the target."""
        assert not isinstance(want.target, int)
        item, end = self._manifest.layout.items[want.index], self._ends[want.index]
        step = self._manifest.layout.segment_bytes
        start = item.offset + number * step
        stop = min(start + step, end)
        scratch = _new_memory(min(_CHUNK_BYTES, stop - start)).data
        hasher = xxhash.xxh3_128()
        for low in range(start, stop, _CHUNK_BYTES):
            for piece in self._pieces(item, low, min(low + _CHUNK_BYTES, stop), want.target, scratch):
                hasher.update(piece)
        self._check(want.index, number, hasher.hexdigest())
        self._progress(stop - start)

    def _pieces(
        self, item: Item, low: int, high: int, target: memoryview | None, scratch: memoryview
    ) -> list[memoryview]:
        """Bytes ``low`` to ``high`` of the file: what is raw data into the target, the rest into scratch."""
        data_low = min(max(low, item.data_offset), high)
        data_high = max(min(high, item.data_offset + item.data_nbytes), data_low)
        if target is None:
            pieces = [scratch[: high - low]]
        else:
            base = item.data_offset
            pieces = [
                scratch[: data_low - low],
                target[data_low - base : data_high - base],
                scratch[data_low - low : data_low - low + high - data_high],
            ]
        pieces = [piece for piece in pieces if len(piece)]
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
        if actual != self._manifest.hashes[index][number]:
            item = self._manifest.layout.items[index]
            start = item.offset + number * self._manifest.layout.segment_bytes
            raise CorruptCheckpointError(
                self.file_path(item.file),
                f"the bytes from {start} on are damaged ({self._names(index)}): their xxh3 hash does not match",
            )

    def _names(self, index: int) -> str:
        names = [describe(path) for path, leaf in self._manifest.paths() if leaf == index]
        return ", ".join(names[:3]) or "what stands around the values"

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
