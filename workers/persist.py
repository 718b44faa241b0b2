"""What a worker does with its part of a save: reconstruct the bytes from the slab, hash, write, sync, leave a receipt.

Every step can be done again by another worker after a crash: the same bytes go to the same places.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import xxhash

from workers import direct as direct_io
from workers import files, slab
from workers.commit import Committed, already_committed, is_still, partial_path, try_commit, vanished
from workers.direct import BLOCK_BYTES, DirectWriter
from workers.directory import partial_name, remove_partial
from workers.errors import InternalError
from workers.faults import point
from workers.files import storage_errors
from workers.formats import get_format
from workers.job import RECORD_NAME, SaveJob, read_layout, to_record
from workers.layout import Item, Layout, Segment, deal_once
from workers.memo import no_collection
from workers.receipt import Receipt, read_receipt
from workers.small_items import SmallItems, runs
from workers.writing import Pace, WriteBack, drop_cached

_WRITE_BYTES = 4 << 20  # hashed and written while it is in the cache
_DIRECT_FROM_BYTES = 4 << 20  # of a part; below this there is nothing to gain
_OPEN_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a part's task returns: its receipt's times, and the commit if this part completed the set."""

    part: int
    pid: int
    started: float
    written: float
    synced: float
    committed: Committed | None


def persist_part(job: SaveJob, part: int) -> PartResult:
    """Write part ``part`` of ``job``; commit if it was the last one.

    Raises:
        StorageError: a system call failed; nothing that looks like a checkpoint is left.
        CorruptCheckpointError: somebody else writes into the partial directory.
    """
    slab.detach_all_but(job.live_slabs)
    with (
        storage_errors("save", partial_path(job.facts)),
        no_collection(),
    ):  # the last net: what is below says more precisely what failed
        point("part.begin")
        layout = read_layout(job)
        done = _write_part(job, layout, part)
        if isinstance(done, Committed):
            return PartResult(part, os.getpid(), done.started, done.started, done.started, done)
        committed = try_commit(job.facts, layout)
    return PartResult(part, done.pid, done.started, done.written, done.synced, committed)


def prepare_worker() -> int:
    """Nothing but proof that this worker is up."""
    return os.getpid()


def discard_partial(directory: str, step: int, save_id: str) -> None:
    """Remove what a failed save left. Runs in a worker, when no part of the save runs any more."""
    remove_partial(directory, partial_name(step, save_id))


def _write_part(job: SaveJob, layout: Layout, part: int) -> Receipt | Committed:
    """The part's receipt; or the commit, when this task was run before and the save needed no more than that."""
    facts, partial = job.facts, partial_path(job.facts)
    directory_fd = _open_partial(partial)
    try:
        point("part.opened")
        fcntl.flock(directory_fd, fcntl.LOCK_SH)  # see NOTE [ The lock on a partial directory ] in commit.py
        committed = already_committed(facts)
        if committed is not None:
            files.remove(partial)  # empty, or the checkpoint that this save replaced
            return committed
        if not is_still(partial, directory_fd):
            vanished(partial)
        receipt = read_receipt(partial, part, facts.num_parts, facts.save_id)
        return receipt or _write_and_sign(job, layout, part, directory_fd)
    finally:
        os.close(directory_fd)


def _open_partial(partial: str) -> int:
    """Make it if it is not there (its parent has to be: a run's directory that was removed is not made again)."""
    with storage_errors("create", partial):
        for _ in range(_OPEN_ATTEMPTS):
            with suppress(FileExistsError):
                os.mkdir(partial)
            with suppress(FileNotFoundError):  # committed, or removed, between the two calls
                return files.open_directory(partial, follow=False)
    vanished(partial)


def _write_and_sign(job: SaveJob, layout: Layout, part: int, directory_fd: int) -> Receipt:
    facts, partial = job.facts, partial_path(job.facts)
    started = time.time()
    if part == 0:
        files.write_atomically(directory_fd, partial, RECORD_NAME, to_record(job), facts.fsync)
    with ExitStack() as opened:
        writer = _PartWriter(job, layout, directory_fd, partial, opened)
        hashes = writer.write(deal_once(layout, facts.num_parts)[part])
        written = time.time()
        point("part.written")
        if facts.fsync:
            writer.sync()
    if facts.fsync:  # the files' names, too, before a receipt says that they are there
        with storage_errors("sync", partial):
            os.fsync(directory_fd)
    synced = time.time()
    point("part.synced")
    receipt = Receipt(part, facts.num_parts, facts.save_id, tuple(hashes), os.getpid(), started, written, synced)
    receipt.write(directory_fd, partial, facts.fsync)
    point("part.receipt")
    return receipt


class _PartWriter:
    """Writes segments, opening each file once. Consecutive small items leave in one ``pwritev``."""

    def __init__(self, job: SaveJob, layout: Layout, directory_fd: int, directory: str, opened: ExitStack) -> None:
        self._view = job.slab.view
        self._base = job.base
        self._layout = layout
        self._frames = get_format(job.facts.kind).frames(layout)
        self._small = SmallItems(layout, job.slab.view, job.base, self._frame)
        self._ends = layout.ends()
        self._directory_fd = directory_fd
        self._directory = directory
        self._opened = opened
        self._fds: dict[int, int] = {}
        self._write_back: dict[int, WriteBack] = {}
        self._fsync = job.facts.fsync
        self._drop_page_cache = job.writing.drop_page_cache
        self._pace = Pace(job.writing.max_bytes_per_sec)
        self._direct_io = job.writing.direct_io
        self._direct: DirectWriter | None = None
        self._batch: list[bytes | memoryview] = []
        self._batch_nbytes = 0
        self._batch_start = (-1, 0)  # file, offset

    def write(self, segments: list[Segment]) -> list[str]:
        """The segments' hashes, hex."""
        if self._goes_direct(sum(segment.end - segment.start for segment in segments)):
            self._direct = DirectWriter(self._open, self._open_direct, self._before_write)
        hashes: list[str] = []
        try:
            for small, run in runs(self._layout, segments):
                hashes += self._write_small(run) if small else map(self._write_one, run)
            self._flush()
        finally:
            if self._direct is not None:  # nothing is written any more when the descriptors are closed
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
        hasher = xxhash.xxh3_128()
        offset = segment.start
        in_place = (item.slab_offset - self._base - item.data_offset) % BLOCK_BYTES == 0  # a slab begins with a block
        for piece in self._pieces(item, segment):
            hasher.update(piece)
            self._put(item.file, offset, piece, in_place and item.data_offset <= offset)
            offset += len(piece)
        return hasher.hexdigest()

    def sync(self) -> None:
        for file, fd in self._fds.items():
            with storage_errors("sync", self._path(file)):
                os.fsync(fd)
                if self._drop_page_cache:
                    drop_cached(fd)

    def _pieces(self, item: Item, segment: Segment) -> Iterator[bytes | memoryview]:
        """The bytes of a segment: what of the header, the raw bytes, the tail and the padding lies in it."""
        head, tail = self._frame(segment.index)
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

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        item = self._layout.items[index]
        head, tail = self._frames(index)
        if (item.offset + len(head), len(head) + item.data_nbytes + len(tail)) != (item.data_offset, item.nbytes):
            raise InternalError(f"{item} is framed in {len(head)} and {len(tail)} bytes here")
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
            fd = os.open(spec.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=self._directory_fd)
            self._opened.callback(os.close, fd)
            os.ftruncate(fd, spec.nbytes)
            self._fds[file] = fd
            self._write_back[file] = WriteBack(fd)
        return fd

    def _path(self, file: int) -> str:
        return os.path.join(self._directory, self._layout.files[file].name)
