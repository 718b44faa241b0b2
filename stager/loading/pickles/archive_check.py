"""Checking an archive of ``torch.save`` before it is loaded: what would loading it cost?

``torch.save`` writes an uncompressed zip archive. ``torch.load`` accepts more: archives that unpack to any size, and
formats of old versions. Its zip reader ignores the case of names and does not search for an archive behind other bytes, so
it can see other records than Python's ``zipfile`` does. Therefore only what ``torch.save`` writes passes, and this check
sees what torch sees.

Format: PKWARE's APPNOTE 4.3; caffe2/serialize/inline_container.cc of PyTorch.
"""

from __future__ import annotations

import struct
import zipfile
from typing import IO

from stager.loading.pickles.pickle_check import check_pickle
from stager.workers.errors import CorruptCheckpointError

_ZIP = b"PK\x03\x04"
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR64_BYTES = 22, 56, 20


def check_archive(file: IO[bytes], nbytes: int, name: str, path: str, *, pickles: bool = True) -> None:
    """Raise unless the archive is one that ``torch.save`` writes.

    Args:
        file: the archive; the data of its tensors is not read.
        nbytes: size of the archive.
        name: of the object, for messages.
        path: of the checkpoint, for messages.
        pickles: also check the pickle in the archive, see :mod:`stager.loading.pickles.pickle_check`.

    Raises:
        CorruptCheckpointError: it is another kind of file, or would take more memory or time than its size allows.
    """
    try:
        problem = _problem_of(file, nbytes, pickles)
    except Exception as error:  # a hostile archive can make zipfile raise anything
        raise CorruptCheckpointError(path, f"{name} is not what torch.save writes: {error}") from error
    if problem is not None:
        raise CorruptCheckpointError(path, f"{name} {problem}, which torch.save never does")


def _problem_of(file: IO[bytes], nbytes: int, pickles: bool) -> str | None:
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:  # torch recognizes archives by these bytes
        return "does not begin as a zip archive"
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored:
            return "is a compressed archive"
        if sum(entry.file_size for entry in entries) > nbytes:
            return "has records that are together larger than the file"
        names = [entry.orig_filename.lower() for entry in entries]
        if len(set(names)) != len(names):
            return "has two records whose names differ in case at most"
        if _directory_start(file, nbytes) != archive.start_dir:
            return "has its directory in another place than its end record says"
        if pickles:
            storages = {_key(entry.orig_filename): entry.file_size for entry in entries}
            for entry in entries:
                if entry.orig_filename.lower().endswith(".pkl"):
                    check_pickle(archive.read(entry), storages)
    return None


def _key(name: str) -> str:
    """The name that a pickle gives to the storage of a record: ``0`` for ``archive/data/0``."""
    return name.partition("/")[2].removeprefix("data/")


def _directory_start(file: IO[bytes], nbytes: int) -> int | None:
    """The offset of the directory, as the end record gives it; None without an end record, or if bytes follow it."""
    end = _read(file, nbytes - _END_BYTES, _END_BYTES)
    if end[:4] != _END or end[20:22] != b"\0\0":
        return None
    locator_at = nbytes - _END_BYTES - _LOCATOR64_BYTES
    locator = _read(file, locator_at, _LOCATOR64_BYTES) if locator_at >= 0 else b""
    if locator[:4] != _LOCATOR64:
        (start,) = struct.unpack("<L", end[16:20])
        return int(start)
    (end64_at,) = struct.unpack("<Q", locator[8:16])
    if end64_at != locator_at - _END64_BYTES:
        return None
    end64 = _read(file, end64_at, _END64_BYTES)
    (start,) = struct.unpack("<Q", end64[48:56])
    return int(start) if end64[:4] == _END64 else None


def _read(file: IO[bytes], offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)
