"""Zip archives, byte by byte: uncompressed records whose data starts at a multiple of 64, as ``torch.save`` makes them.

Headers, entries and end are separate functions: several workers write the data between them at once. Format: PKWARE's
APPNOTE.TXT 6.3.10, sections 4.3 (records), 4.4.2 (versions), 4.5.3 (zip64). Padding goes into an extra field ``FB``, as in
PyTorch's caffe2/serialize/inline_container.cc.

Record names are relative to the archive's one directory, ``archive/``, where torch looks for them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES

DIRECTORY = "archive/"

_MAX_32 = 0xFFFFFFFF
_MAX_16 = 0xFFFF
_VERSION_ZIP64 = 45
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True, slots=True)
class Record:
    """A file inside the archive.

    Attributes:
        name: without ``archive/``.
        nbytes: size of its data.
        offset: where its local header starts.
        crc32: of its data; 0 if not computed.
    """

    name: str
    nbytes: int
    offset: int
    crc32: int = 0


def local_header(record: Record) -> bytes:
    """Make the header before a record's data, padded so that the data starts at a multiple of 64 of the file."""
    name = (DIRECTORY + record.name).encode()
    large = record.nbytes >= _MAX_32
    extra = struct.pack("<2H2Q", 1, 16, record.nbytes, record.nbytes) if large else b""
    end = record.offset + _LOCAL.size + len(name) + len(extra) + 4
    padding = -end % BLOB_ALIGN_BYTES
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = _MAX_32 if large else record.nbytes
    version = _VERSION_ZIP64 if large else 0
    fixed = _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, 0, record.crc32, size, size, len(name), len(extra))
    return fixed + name + extra


def directory_entry(record: Record) -> bytes:
    """Make a record's entry in the central directory."""
    name = (DIRECTORY + record.name).encode()
    wide: list[int] = []
    size, offset = record.nbytes, record.offset
    if size >= _MAX_32:
        wide, size = [record.nbytes, record.nbytes], _MAX_32
    if offset >= _MAX_32:
        wide, offset = [*wide, record.offset], _MAX_32
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _VERSION_ZIP64 if wide else 0
    fixed = _ENTRY.pack(
        *(b"PK\1\2", version, version, 0, 0, 0, 0),
        *(record.crc32, size, size, len(name), len(extra), 0, 0, 0, 0, offset),
    )
    return fixed + name + extra


def directory_of(records: Sequence[Record], offset: int, entries: bytes = b"", count: int = 0) -> bytes:
    """Make the central directory, which starts at ``offset``, and the end of an archive.

    Args:
        entries, count: entries of other records, which come first, and their number.
    """
    entries = b"".join((entries, *map(directory_entry, records)))
    count, nbytes, end = count + len(records), len(entries), offset + len(entries)
    wide = b""
    if count >= _MAX_16 or end >= _MAX_32:
        version = _VERSION_ZIP64
        end_64 = _END_64.pack(b"PK\6\6", _END_64.size - 12, version, version, 0, 0, count, count, nbytes, offset)
        wide = end_64 + _LOCATOR_64.pack(b"PK\6\7", 0, end, 1)
    count, nbytes, offset = min(count, _MAX_16), min(nbytes, _MAX_32), min(offset, _MAX_32)
    return b"".join((entries, wide, _END.pack(b"PK\5\6", 0, 0, count, count, nbytes, offset, 0)))


def put_records(contents: Sequence[tuple[str, bytes | memoryview]], offset: int = 0) -> tuple[bytes, list[Record]]:
    """Make whole records one after the other from ``offset`` on. Returns their bytes, and the records."""
    pieces, records = _pieces_of(contents, offset)
    return b"".join(pieces), records


def archive(contents: Sequence[tuple[str, bytes | memoryview]]) -> bytes:
    """Make a whole archive. Its records are copied once."""
    pieces, records = _pieces_of(contents, 0)
    return b"".join([*pieces, directory_of(records, sum(map(len, pieces)))])


def _pieces_of(
    contents: Sequence[tuple[str, bytes | memoryview]], offset: int
) -> tuple[list[bytes | memoryview], list[Record]]:
    pieces: list[bytes | memoryview] = []
    records: list[Record] = []
    for name, data in contents:
        records.append(Record(name, len(data), offset, zlib.crc32(data)))
        pieces += [local_header(records[-1]), data]
        offset += len(pieces[-2]) + len(data)
    return pieces, records
