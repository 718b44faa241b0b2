"""The receipt of a file: what was written, left beside it until the commit. Rank 0 need not read what other ranks wrote.

It counts as long as the file is as it was then, by size and time: so a file that was written again, by whatever program, is
hashed anew.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass

from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.layout.layout_check import check_count, check_text, check_texts
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError

SEGMENT_BYTES = 16 << 20
"""What one hash covers, and what is read at least to check a slice of a tensor."""

_RECEIPT = re.compile(r"\.(.+)\.stager-receipt")
_MARKER = re.compile(r"\.stager-begun-[0-9a-f]+")
_UNFINISHED = re.compile(r"\.(.+)\.stager-unfinished-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class FileReceipt:
    """What one file was when it was written.

    Attributes:
        nbytes, mtime_ns: of the file.
        whole: xxh3_128 of all of it, hex.
        hashes: xxh3_128 of each of its segments, hex.
        run: of the training that wrote it, see ``StagerStorageConfig``.
        writer: the process of that training.
    """

    nbytes: int
    mtime_ns: int
    whole: str
    hashes: tuple[str, ...]
    run: str
    writer: str

    def to_bytes(self) -> bytes:
        """Serialise it, sealed."""
        return seal(asdict(self))

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether the file is as it was then."""
        return (self.nbytes, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def read_file_receipt(path: str) -> FileReceipt | None:
    """Read a receipt; None if there is none, or if it is damaged, as a receipt can be that was not synced."""
    data = files.read_if_exists(path)
    if data is None:
        return None
    try:
        body = unseal(data, path)
        return FileReceipt(
            check_count(body["nbytes"]),
            check_count(body["mtime_ns"]),
            check_text(body["whole"]),
            check_texts(body["hashes"]),
            check_text(body["run"]),
            check_text(body["writer"]),
        )
    except (CorruptCheckpointError, KeyError, TypeError, ValueError):
        return None


def receipt_path(path: str) -> str:
    """Return the path of a file's receipt."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.stager-receipt")


def unfinished_path(path: str, nonce: str) -> str:
    """Return the path at which a file is written. It gets its own name when all of it is there."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.stager-unfinished-{nonce}")


def marker_path(directory: str, writer: str) -> str:
    """Return the path of the marker that a process has begun a save in a directory."""
    return os.path.join(directory, f".stager-begun-{writer}")


def name_of_receipt(name: str) -> str | None:
    """Return the name of the file that a receipt is of; None: ``name`` is not a receipt's."""
    match = _RECEIPT.fullmatch(name)
    return None if match is None else match[1]


def is_receipt(name: str) -> bool:
    """Whether a name in a directory is that of a receipt."""
    return name_of_receipt(name) is not None


def is_marker(name: str) -> bool:
    """Whether a name in a directory is that of a marker."""
    return _MARKER.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether a name in a directory is that of a file that is being written, or that a killed process has left."""
    return _UNFINISHED.fullmatch(name) is not None
