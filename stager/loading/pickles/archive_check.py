"""What an archive of ``torch.save`` would cost whoever loads it, found out without loading it.

It is a zip archive that is stored as it is. ``torch.load`` would also take one that unpacks to any size, and formats of long
ago; and its own reader of zip archives, which takes names without their case and does not look for an archive behind other
bytes, can see something else in one than Python's does. So nothing is let through but what ``torch.save`` writes, and what
is looked at here is what torch sees.

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
    """
    Args:
        file, nbytes: the archive; its data is not read.
        name, path: of the object and the checkpoint, for messages.
        pickles: check the pickle in it, too: see :mod:`stager.loading.pickles.pickle_check`.

    Raises:
        CorruptCheckpointError: it is something else, or would take more memory or time than its size allows.
    """
    try:
        problem = _problem_of(file, nbytes, pickles)
    except Exception as error:  # a hostile archive can fail in any way
        raise CorruptCheckpointError(path, f"{name} is not what torch.save writes: {error}") from error
    if problem is not None:
        raise CorruptCheckpointError(path, f"{name} {problem}, which torch.save never does")


def _problem_of(file: IO[bytes], nbytes: int, pickles: bool) -> str | None:
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:  # torch goes by this
        return "does not begin as a zip archive"
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > nbytes:
            return "is packed smaller than what is in it"
        names = [entry.orig_filename.lower() for entry in entries]
        if len(set(names)) != len(names):
            return "has two records of one name"
        if _directory_start(file, nbytes) != archive.start_dir:
            return "has its directory elsewhere"
        if pickles:
            storages = {_key(entry.orig_filename): entry.file_size for entry in entries}
            for entry in entries:
                if entry.orig_filename.lower().endswith(".pkl"):
                    check_pickle(archive.read(entry), storages)
    return None


def _key(name: str) -> str:
    """What a pickle calls the storage of a record: ``0`` for ``archive/data/0``."""
    return name.partition("/")[2].removeprefix("data/")


def _directory_start(file: IO[bytes], nbytes: int) -> int | None:
    """Where the end of the archive says that its directory is; None: it has no such end, or something behind it."""
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
