"""Write the bytes of a part of a save: take them from the slab, hash, write, sync."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

import xxhash

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.layout import Item, Layout, Segment
from stager.workers.checkpoint.write import direct_io
from stager.workers.checkpoint.write.direct_io import BLOCK_BYTES, DirectWriter
from stager.workers.checkpoint.write.small_items import SmallItems, runs
from stager.workers.checkpoint.write.write_back import Pace, WriteBack, drop_cached
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import InternalError
from stager.workers.faults import point

_WRITE_BYTES = 4 << 20  # a piece stays in the CPU's cache between hashing and writing
_DIRECT_FROM_BYTES = 4 << 20  # smaller parts gain nothing


class PartWriter:
    """Writes segments, opening each file once. Consecutive small items go into one ``pwritev``.

    Args:
        opened: the exit stack that closes the files.
    """

    def __init__(self, task: WriteTask, layout: Layout, directory_fd: int, directory: str, opened: ExitStack) -> None:
        self._view = task.slab.view
        self._base = task.base
        self._layout = layout
        self._around = get_format(task.spec.kind).headers_and_tails(layout)
        self._small = SmallItems(layout, task.slab.view, task.base, self._header_and_tail)
        self._ends = layout.ends()
        self._directory_fd = directory_fd
        self._directory = directory
        self._opened = opened
        self._fds: dict[int, int] = {}
        self._write_back: dict[int, WriteBack] = {}
        self._fsync = task.spec.fsync
        self._drop_page_cache = task.writing.drop_page_cache
        self._pace = Pace(task.writing.max_bytes_per_sec)
        self._direct_io = task.writing.direct_io
        self._direct: DirectWriter | None = None
        self._batch: list[bytes | memoryview] = []
        self._batch_nbytes = 0
        self._batch_start = (-1, 0)  # file, offset
        self._own_files: Collection[int] = ()
        self._known: Mapping[Segment, str] = {}

    def prepare(self, own_files: Collection[int], known: Mapping[Segment, str]) -> None:
        """Say what is special in this part.

        Args:
            own_files: files that only this part writes. They are created anew: an existing one may be a link.
            known: hashes that need not be computed again.
        """
        self._own_files, self._known = own_files, known

    def hash(self, segments: Sequence[Segment]) -> Iterator[str]:
        """Iterate over the hashes of the segments, hex, without writing."""
        for small, run in runs(self._layout, segments):
            yield from self._small.pack(run)[1] if small else map(self._hash_one, run)

    def _hash_one(self, segment: Segment) -> str:
        hasher = xxhash.xxh3_128()
        for piece in self._pieces(self._layout.items[segment.index], segment):
            hasher.update(piece)
        return hasher.hexdigest()

    def write(self, segments: list[Segment]) -> list[str]:
        """Write the segments. Returns their hashes, hex."""
        if self._goes_direct(sum(segment.end - segment.start for segment in segments)):
            self._direct = DirectWriter(self._open, self._open_direct, self._before_write)
        hashes: list[str] = []
        try:
            for small, run in runs(self._layout, segments):
                hashes += self._write_small(run) if small else map(self._write_one, run)
            self._flush()
        finally:
            if self._direct is not None:  # its writes must end before the files are closed
                self._direct.close()
        return hashes

    def _goes_direct(self, nbytes: int) -> bool:
        if nbytes < _DIRECT_FROM_BYTES or self._direct_io is False:
            return False
        return self._direct_io or direct_io.is_worth_it(self._directory_fd)

    def _write_small(self, run: Sequence[Segment]) -> list[str]:
        data, hashes = self._small.pack(run)
        self._put(self._layout.items[run[0].index].file, run[0].start, data)
        return hashes

    def _write_one(self, segment: Segment) -> str:
        item = self._layout.items[segment.index]
        known = self._known.get(segment)
        hasher = xxhash.xxh3_128()
        offset = segment.start
        in_place = (item.slab_offset - self._base - item.data_offset) % BLOCK_BYTES == 0  # a slab begins with a block
        for piece in self._pieces(item, segment):
            if known is None:
                hasher.update(piece)
            self._put(item.file, offset, piece, in_place and item.data_offset <= offset)
            offset += len(piece)
        return known or hasher.hexdigest()

    def sync(self) -> None:
        """Sync every file that was written.

        Raises:
            StorageError
        """
        for file, fd in self._fds.items():
            with storage_errors("sync", self._path(file)):
                point("part.sync")
                os.fsync(fd)
                if self._drop_page_cache:
                    drop_cached(fd)

    def _pieces(self, item: Item, segment: Segment) -> Iterator[bytes | memoryview]:
        """Iterate over the bytes of a segment: the parts of header, raw bytes, tail and padding inside it."""
        head, tail = self._header_and_tail(segment.index)
        start, end = segment.start, segment.end
        data_end = item.data_offset + item.data_nbytes
        if start < item.data_offset:
            yield head[start - item.offset : end - item.offset]
        low, high = max(start, item.data_offset), min(end, data_end)
        if low < high:
            base = item.slab_offset - item.data_offset - self._base
            while low < high:  # cut between blocks of the file
                position, low = low, min(high, (low // _WRITE_BYTES + 1) * _WRITE_BYTES)
                yield self._view[base + position : base + low]
        if end > data_end:
            tail += b"\0" * (self._ends[segment.index] - data_end - len(tail))
            yield tail[max(0, start - data_end) : end - data_end]

    def _header_and_tail(self, index: int) -> tuple[bytes, bytes]:
        item = self._layout.items[index]
        head, tail = self._around(index)
        if (item.offset + len(head), len(head) + item.data_nbytes + len(tail)) != (item.data_offset, item.nbytes):
            raise InternalError(
                f"{item} has a header of {len(head)} and a tail of {len(tail)} bytes here, unlike in the plan"
            )
        return head, tail

    def _put(self, file: int, offset: int, piece: bytes | memoryview, in_place: bool = False) -> None:
        if self._direct is not None:
            self._put_direct(self._direct, file, offset, piece, in_place)
            return
        batch_file, batch_offset = self._batch_start
        full = self._batch_nbytes + len(piece) > _WRITE_BYTES or len(self._batch) >= files.IOV_MAX
        if full or file != batch_file or offset != batch_offset + self._batch_nbytes:
            self._flush()
            self._batch_start = (file, offset)
        self._batch.append(piece)
        self._batch_nbytes += len(piece)

    def _put_direct(
        self, direct: DirectWriter, file: int, offset: int, piece: bytes | memoryview, in_place: bool
    ) -> None:
        if file != self._batch_start[0]:
            self._flush()  # so that an error names the file it is about
        self._batch_start = (file, offset)
        with storage_errors("write", self._path(file)):
            direct.put(file, offset, piece, in_place=in_place)

    def _flush(self) -> None:
        file, offset = self._batch_start
        if self._direct is not None and file >= 0:
            with storage_errors("write", self._path(file)):
                self._direct.flush()
        if self._batch:
            with storage_errors("write", self._path(file)):
                self._before_write(file, self._batch_nbytes)
                files.write_all(self._open(file), self._batch, offset)
            if self._fsync:
                self._write_back[file].wrote(offset, self._batch_nbytes)
        self._batch, self._batch_nbytes, self._batch_start = [], 0, (-1, 0)

    def _before_write(self, file: int, nbytes: int) -> None:
        point("part.write")
        self._pace.wrote(nbytes)

    def _open_direct(self, file: int) -> int:
        name = self._layout.files[file].name
        fd = os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory_fd)
        self._opened.callback(os.close, fd)
        return fd

    def _open(self, file: int) -> int:
        fd = self._fds.get(file)
        if fd is None:
            spec = self._layout.files[file]
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            if file in self._own_files:
                flags |= os.O_EXCL
                with suppress(FileNotFoundError):
                    os.unlink(spec.name, dir_fd=self._directory_fd)
            fd = os.open(spec.name, flags, 0o666, dir_fd=self._directory_fd)
            self._opened.callback(os.close, fd)
            os.ftruncate(fd, spec.nbytes)
            self._fds[file] = fd
            self._write_back[file] = WriteBack(fd)
        return fd

    def _path(self, file: int) -> str:
        return os.path.join(self._directory, self._layout.files[file].name)
