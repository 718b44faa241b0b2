"""Reading a committed checkpoint: bytes in parallel, each segment checked against its hash.

Positioned reads (``preadv``) into memory that the caller owns; nothing is unpickled here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import xxhash

from workers.errors import CorruptCheckpointError
from workers.files import open_regular, storage_errors
from workers.layout import Item, num_segments
from workers.manifest import Manifest
from workers.structure import describe

_GROUP_BYTES = 8 << 20
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """An item to read, and where its raw bytes go (``None``: nowhere, check them only)."""

    index: int
    target: memoryview | None


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
        self._ends = [end for _, _, end in manifest.layout.spans()]
        self._fds: list[int] = []
        try:
            for index, spec in enumerate(manifest.layout.files):
                self._fds.append(_open(self.file_path(index)))
                self._check_size(index, spec.nbytes)
        except BaseException:
            self.close()
            raise

    def _check_size(self, file: int, nbytes: int) -> None:
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
        groups = self._group(wanted)
        if self._num_threads == 1 or len(groups) == 1:
            for group in groups:
                self._read_group(group, on_error)
            return
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="stager-read") as executor:
            futures = [executor.submit(self._read_group, group, on_error) for group in groups]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _group(self, wanted: Sequence[Wanted]) -> list[list[Wanted]]:
        """Neighbours in one file, up to ``_GROUP_BYTES`` together: one read for many small items."""
        groups: list[list[Wanted]] = []
        nbytes = _GROUP_BYTES
        following = (-1, -1)
        for want in wanted:
            item = self._manifest.layout.items[want.index]
            span = self._ends[want.index] - item.offset
            if (item.file, item.offset) != following or nbytes + span > _GROUP_BYTES:
                groups.append([])
                nbytes = 0
            groups[-1].append(want)
            nbytes += span
            following = (item.file, self._ends[want.index])
        return groups

    def _read_group(self, group: list[Wanted], on_error: Callable[[CorruptCheckpointError], None] | None) -> None:
        items = self._manifest.layout.items
        first, last = items[group[0].index], group[-1].index
        if len(group) == 1:
            self._guarded(partial(self._read_large, group[0]), on_error)
            return
        buffer = memoryview(bytearray(self._ends[last] - first.offset))
        self._pread(first.file, [buffer], first.offset)
        for want in group:
            span = buffer[items[want.index].offset - first.offset : self._ends[want.index] - first.offset]
            self._guarded(partial(self._take_small, want, span), on_error)
        self._progress(len(buffer))

    @staticmethod
    def _guarded(read: Callable[[], None], on_error: Callable[[CorruptCheckpointError], None] | None) -> None:
        try:
            read()
        except CorruptCheckpointError as error:
            if on_error is None:
                raise
            on_error(error)

    def _take_small(self, want: Wanted, span: memoryview) -> None:
        item = self._manifest.layout.items[want.index]
        step = self._manifest.layout.segment_bytes
        for number in range(num_segments(len(span), step)):
            segment = span[number * step : (number + 1) * step]
            self._check(want.index, number, xxhash.xxh3_128_hexdigest(segment))
        if want.target is not None:
            start = item.data_offset - item.offset
            want.target[:] = span[start : start + item.data_nbytes]

    def _read_large(self, want: Wanted) -> None:
        """One item, segment by segment, its raw bytes straight into the target."""
        item, end = self._manifest.layout.items[want.index], self._ends[want.index]
        step = self._manifest.layout.segment_bytes
        scratch = memoryview(bytearray(min(_CHUNK_BYTES, end - item.offset)))
        for number, start in enumerate(range(item.offset, end, step)):
            hasher = xxhash.xxh3_128()
            stop = min(start + step, end)
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
        pending = list(buffers)
        with storage_errors("read", self.file_path(file)):
            while pending:
                count = os.preadv(self._fds[file], pending, offset)
                if count == 0:
                    raise CorruptCheckpointError(self.file_path(file), f"ends at byte {offset}")
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
