"""``manifest.json``: what a committed checkpoint consists of, to the byte.

Its presence under its final name is what makes a directory a checkpoint. It names every file with its size, every item
with its place, dtype, shape and hashes, and the structure of the state. Body of the sealed document
(:mod:`workers.envelope`), version 1:

    format "stager", version 1, kind "dcp" (the on-disk format of the items), step, save_id, created (unix seconds),
    torch, stager (versions that wrote it), segment_bytes,
    files        [[name, nbytes], ...]                 data files, tiled by the items' spans
    index_files  [[name, nbytes, xxh3_128], ...]       .metadata
    columns      names of the columns of a row
    rows         [[kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride, [xxh3_128, ...]], ...]
    structure    see :mod:`workers.structure`

A row's hashes cover its span in steps of segment_bytes. Reading checks all of it against the files' sizes before anything
is allocated: a hostile manifest can neither name a path outside its directory nor ask for more memory than its files hold.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workers.envelope import seal, unseal
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError
from workers.formats.dcp import dtype_of
from workers.layout import ROW_COLUMNS, FileSpec, Item, Layout, num_segments
from workers.structure import Path, walk

MANIFEST_NAME = "manifest.json"
VERSION = 1

_FILE_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A small file hashed as a whole."""

    name: str
    nbytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of a checkpoint that are not about a single item."""

    kind: str
    step: int
    save_id: str
    created: float
    torch: str
    stager: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Attributes:
    header: step, identity, versions.
    layout: files, items and structure.
    hashes: for each item, the hashes of its segments, hex.
    index_files: the files written at commit.
    """

    header: Header
    layout: Layout
    hashes: tuple[tuple[str, ...], ...]
    index_files: tuple[IndexFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(f.nbytes for f in self.layout.files) + sum(f.nbytes for f in self.index_files)

    def paths(self) -> Iterable[tuple[Path, int]]:
        """Each leaf of the state: its path and its item."""
        return walk(self.layout.structure)

    def count(self, kind: str) -> int:
        return sum(item.kind == kind for item in self.layout.items)

    def to_bytes(self) -> bytes:
        header, layout = self.header, self.layout
        return seal(
            {
                "format": "stager",
                "version": VERSION,
                "kind": header.kind,
                "step": header.step,
                "save_id": header.save_id,
                "created": header.created,
                "torch": header.torch,
                "stager": header.stager,
                "segment_bytes": layout.segment_bytes,
                "files": [[f.name, f.nbytes] for f in layout.files],
                "index_files": [[f.name, f.nbytes, f.xxh3_128] for f in self.index_files],
                "columns": [*ROW_COLUMNS, "xxh3_128"],
                "rows": [[*item.to_row(), hashes] for item, hashes in zip(layout.items, self.hashes, strict=True)],
                "structure": layout.structure,
            }
        )


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a checkpoint directory (not the data files: see :mod:`workers.verify`).

    Raises:
        CheckpointNotFoundError: no directory or no manifest there.
        CorruptCheckpointError: the manifest is damaged, or says something impossible.
    """
    path = os.path.join(os.fspath(directory), MANIFEST_NAME)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(error.errno, "not a committed checkpoint: it has no manifest", path) from error
    except OSError as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error.strerror}") from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The checked content of a manifest; ``path`` is for error messages."""
    body = unseal(data, path)
    if not isinstance(body, dict) or body.get("format") != "stager":
        raise CorruptCheckpointError(path, "not a stager manifest")
    if body.get("version") != VERSION:
        raise CorruptCheckpointError(
            path, f"manifest version {body.get('version')!r}; this stager reads version {VERSION}: upgrade it"
        )
    try:
        return _build(body)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"says something impossible: {error!r}") from error


def _build(body: dict[str, Any]) -> Manifest:
    if body["columns"] != [*ROW_COLUMNS, "xxh3_128"]:
        raise ValueError("unknown columns")
    header = Header(
        kind=_text(body["kind"]),
        step=_count(body["step"]),
        save_id=_text(body["save_id"]),
        created=float(body["created"]),
        torch=_text(body["torch"]),
        stager=_text(body["stager"]),
    )
    files = tuple(FileSpec(_file_name(name), _count(nbytes)) for name, nbytes in body["files"])
    index_files = tuple(IndexFile(_file_name(n), _count(b), _text(h)) for n, b, h in body["index_files"])
    names = [f.name for f in files] + [f.name for f in index_files]
    if len(set(names)) != len(names) or MANIFEST_NAME in names:
        raise ValueError("two files of one name")
    items = tuple(Item.from_row(row[:-1]) for row in body["rows"])
    layout = Layout(files, items, body["structure"], _count(body["segment_bytes"]))
    hashes = tuple(tuple(map(_text, row[-1])) for row in body["rows"])
    _check_items(layout, hashes)
    _check_structure(layout)
    return Manifest(header, layout, hashes, index_files)


def _check_items(layout: Layout, hashes: tuple[tuple[str, ...], ...]) -> None:
    """Spans tile their files in order; the raw bytes lie in the blob; shape, stride and size agree."""
    if layout.segment_bytes < 1:
        raise ValueError("segment_bytes is 0")
    position, file = 0, 0
    sizes = [0] * len(layout.files)
    for index, item, end in layout.spans():
        numbers = (item.file, item.offset, item.nbytes, item.data_offset, item.data_nbytes, *item.shape, *item.stride)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"item {index}: not a size: {numbers}")
        if item.file != file:
            position, file = 0, item.file
        if item.offset != position or item.offset + item.nbytes > end or end > layout.files[file].nbytes:
            raise ValueError(f"item {index}: its span does not follow the one before it")
        if not item.offset <= item.data_offset <= item.data_offset + item.data_nbytes <= item.offset + item.nbytes:
            raise ValueError(f"item {index}: its data is not inside its blob")
        if len(hashes[index]) != num_segments(end - item.offset, layout.segment_bytes):
            raise ValueError(f"item {index}: wrong number of hashes")
        _check_kind(index, item)
        sizes[file] = position = end
    if sizes != [f.nbytes for f in layout.files]:
        raise ValueError("the items do not fill the files")


def _check_kind(index: int, item: Item) -> None:
    if item.kind == "object":
        return
    if item.kind != "tensor":
        raise ValueError(f"item {index}: unknown kind {item.kind!r}")
    if math.prod(item.shape) * dtype_of(item.dtype).itemsize != item.data_nbytes:
        raise ValueError(f"item {index}: {item.dtype} of shape {item.shape} is not {item.data_nbytes} bytes")
    if len(item.stride) != len(item.shape) or not _is_dense(item.shape, item.stride):
        raise ValueError(f"item {index}: stride {item.stride} does not cover shape {item.shape}")


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Each element has a place of its own and no place is unused."""
    expected = 1
    for length, step in sorted(
        ((n, s) for n, s in zip(shape, stride, strict=True) if n != 1), key=lambda pair: pair[1]
    ):
        if length == 0:
            return True
        if step != expected:
            return False
        expected *= length
    return True


def _check_structure(layout: Layout) -> None:
    used = [False] * len(layout.items)
    for path, index in walk(layout.structure):
        if not 0 <= index < len(used):
            raise ValueError(f"leaf {path} names item {index} of {len(used)}")
        used[index] = True
    if not all(used):
        raise ValueError(f"item {used.index(False)} is in no place of the structure")


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise ValueError(f"not a file name: {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a string: {value!r}")
    return value
