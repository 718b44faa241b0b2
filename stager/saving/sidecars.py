"""Sidecars: small files that belong to a checkpoint beside its state, as the user gives them to ``save(files=...)``.

Their bytes are read when ``save()`` is called, and travel in the slab. A worker writes them before anything else of the
save; the manifest has their sizes and hashes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from stager.config.arguments import shown
from stager.workers.checkpoint.documents.manifest import IndexFile
from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.storage.posix.files import DOCUMENT_BYTES, storage_errors
from stager.workers.errors import ArgumentError

File = bytes | bytearray | memoryview | str | os.PathLike[str]
"""What a user gives for a file: its bytes, or the path of a file to copy."""

_EXAMPLE = 'files={"config.json": b"..."}'


@dataclass(frozen=True)
class Sidecars:
    """The files, and their bytes in the same order."""

    files: tuple[IndexFile, ...] = ()
    data: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


NO_SIDECARS = Sidecars()


def read_sidecars(given: Mapping[str, File]) -> Sidecars:
    """Read what was given to ``save(files=...)``.

    Raises:
        ArgumentError: it is no mapping, or names or values cannot be meant; names the file.
        StorageError: a file cannot be read.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"files must be a mapping of names to bytes or paths, got {shown(given)}; write save(step, state, {_EXAMPLE})"
        )
    names = sorted(map(_checked_name, given))
    data = tuple(_bytes_of(name, given[name]) for name in names)
    files = tuple(
        IndexFile(name, len(content), xxhash.xxh3_128_hexdigest(content))
        for name, content in zip(names, data, strict=True)
    )
    return Sidecars(files, data)


def _checked_name(name: object) -> str:
    what = f"files has the name {name!r}"
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ArgumentError(f'{what}; a name is text without /, such as "config.json": the files lie beside the state')
    if is_own(name):
        raise ArgumentError(f"{what}, which stager gives a file of its own in a checkpoint; give it another name")
    try:
        nbytes = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{what}, which no file can have: {error.reason}; give it another name") from error
    if nbytes > 240:  # a temporary name is longer
        raise ArgumentError(f"{what[:80]}..., which has {nbytes} bytes; give it one of at most 240 bytes")
    return name


def _bytes_of(name: str, value: File) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        with storage_errors("read", path), open(path, "rb") as file:
            data = file.read(DOCUMENT_BYTES + 1)
    else:
        raise ArgumentError(
            f"files[{name!r}] must be bytes, or the path of a file, got {shown(value)}; encode text with .encode()"
        )
    if len(data) > DOCUMENT_BYTES:
        raise ArgumentError(
            f"files[{name!r}] has more than {DOCUMENT_BYTES:,} bytes; save what is large as a part of the state, as a tensor"
        )
    return data
