"""One file of a committed checkpoint that is being read: what a caller gets was compared with its hashes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from stager.workers.checkpoint.documents.envelope import is_sealed
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest, parse_manifest
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError

_MARKS = (b'"xxh3_128"', b'"format":"stager"', b'"save_id"')  # in every sealed manifest
_UNCHECKED = (
    ". Without it, nothing that is read here can be checked. Load another checkpoint, or this one unchecked with "
    "StagerStorageConfig(verify=False)"
)


@dataclass(frozen=True, slots=True)
class HashedFile:
    """What the manifest says of a file: hashes of its segments, or of all of it."""

    nbytes: int
    segment_bytes: int
    hashes: tuple[str, ...]

    def check_size(self, path: str, nbytes: int) -> None:
        """Raise a CorruptCheckpointError if the file has another size."""
        if nbytes != self.nbytes:
            raise CorruptCheckpointError(path, f"is {nbytes} bytes long, should be {self.nbytes}")


def hashed_files(directory: str) -> Mapping[str, HashedFile] | None:
    """Return the files of a checkpoint by their names; None if its manifest.json is another program's, or is gone.

    Raises:
        CorruptCheckpointError: the manifest is damaged.
    """
    path = os.path.join(directory, MANIFEST_NAME)
    try:
        data = storage_of(directory).read_manifest(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error.strerror}{_UNCHECKED}") from error
    if is_sealed(data):
        return _by_name(parse_manifest(data, path))
    if _is_of_another_program(data):
        return None
    raise CorruptCheckpointError(path, f"is damaged: its {len(data)} bytes are no manifest of stager{_UNCHECKED}")


def _is_of_another_program(data: bytes) -> bool:
    """Whether a manifest.json is certainly not stager's: whole JSON, in which nothing is as in a sealed manifest.

    A manifest that is cut short, empty too, is no JSON any more. One with damaged bytes still has most of its marks.
    """
    if any(mark in data for mark in _MARKS):
        return False
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _by_name(manifest: Manifest) -> Mapping[str, HashedFile]:
    found = {one.name: HashedFile(one.nbytes, max(1, one.nbytes), (one.xxh3_128,)) for one in manifest.index_files}
    layout = manifest.layout
    of_file: dict[int, list[int]] = {}
    for index, file in enumerate(layout.files_of_items()):
        of_file.setdefault(file, []).append(index)
    for number, one in enumerate(layout.files):
        if len(of_file[number]) == 1:  # as all are that torch_checkpointing wrote
            found[one.name] = HashedFile(one.nbytes, layout.segment_bytes, manifest.hashes[of_file[number][0]])
    return found


class ReadStream(io.RawIOBase):
    """What ``Storage.stream_read()`` returns. Each segment that is touched is read whole and compared.

    A reader that asks for whole segments gets them straight into its buffer.

    Raises:
        CorruptCheckpointError: the file has another size, or a segment another hash; names the bytes.
        StorageError: it cannot be read.
    """

    def __init__(self, path: str, expected: HashedFile) -> None:
        self._path = path
        self._expected = expected
        self._position = 0
        self._held: tuple[int, memoryview] | None = None  # a segment of which a part was asked for
        with storage_errors("open", path):
            self._fd = files.open_regular(path)
        try:
            expected.check_size(path, os.fstat(self._fd).st_size)
        except CorruptCheckpointError:
            self.close()
            raise

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._expected.nbytes}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._path}: there is no position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    # Each view of the caller's buffer is released, also if this raises: the traceback would keep it, and then the caller
    # could not close a mapping that is its buffer.
    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, unless the file ends before; returns how many bytes there are."""
        with memoryview(buffer) as given, given.cast("B") as view:
            count = min(len(view), max(0, self._expected.nbytes - self._position))
            done = 0
            while done < count:
                taken = self._fill(view, done, count)
                done += taken
                self._position += taken
        return count

    def _fill(self, view: memoryview, start: int, end: int) -> int:
        """Fill what the segment at the position has of ``view[start:end]``; returns how many bytes it is."""
        segment, skipped = divmod(self._position, self._expected.segment_bytes)
        nbytes = self._nbytes_of(segment)
        taken = min(nbytes - skipped, end - start)
        if taken == nbytes:
            with view[start : start + nbytes] as target:
                self._read(segment, target)
        else:
            view[start : start + taken] = self._segment(segment)[skipped : skipped + taken]
        return taken

    def _nbytes_of(self, segment: int) -> int:
        step = self._expected.segment_bytes
        return min(step, self._expected.nbytes - segment * step)

    def _segment(self, segment: int) -> memoryview:
        if self._held is None or self._held[0] != segment:
            self._held = None  # its memory is freed before there is another one
            data = memoryview(bytearray(self._nbytes_of(segment)))
            self._read(segment, data)
            self._held = (segment, data)
        return self._held[1]

    def _read(self, segment: int, target: memoryview) -> None:
        start, got = segment * self._expected.segment_bytes, 0
        with storage_errors("read", self._path):
            while got < len(target):
                count = os.preadv(self._fd, [target[got:]], start + got)
                if count == 0:
                    raise CorruptCheckpointError(self._path, f"ends at byte {start + got}, while it is read")
                got += count
        if xxhash.xxh3_128_hexdigest(target) != self._expected.hashes[segment]:
            raise CorruptCheckpointError(
                self._path, f"is damaged: bytes {start} to {start + len(target)} do not match their hash"
            )

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._held = None
        super().close()
