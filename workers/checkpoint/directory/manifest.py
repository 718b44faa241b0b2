"""``manifest.json``: what a committed checkpoint consists of, to the byte.

Its presence under its final name is what makes a directory a checkpoint. It names every file with its size, every item
with its place, dtype, shape and hashes, and the structure of the state. Body of the sealed document
(:mod:`stager.workers.checkpoint.directory.envelope`), version 1:

    format "stager", version 1, kind "dcp" (the on-disk format of the items), step, save_id, created (unix seconds),
    torch, stager (versions that wrote it), segment_bytes,
    linked       [bytes of files shared with an earlier checkpoint, saves since one was written without sharing]
    files        [[name, nbytes], ...]                 data files, tiled by the items' spans
    index_files  [[name, nbytes, xxh3_128], ...]       .metadata
    columns      names of the columns of a row
    rows         [[kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride, [xxh3_128, ...]], ...]
    structure    see :mod:`stager.workers.checkpoint.layout.structure`

A row's hashes cover its span in steps of segment_bytes. Reading checks that all of it is possible
(``layout_check``); opening the data files compares their sizes (``blob_reader``).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.envelope import seal_json, unseal
from stager.workers.checkpoint.directory.manifest_rows import rows_json, structure_json
from stager.workers.checkpoint.layout.layout import ROW_COLUMNS, FileSpec, Item, Layout, num_segments
from stager.workers.checkpoint.layout.layout_check import (
    check_count,
    check_distinct,
    check_file_name,
    check_layout,
    check_step,
    check_text,
    check_time,
)
from stager.workers.checkpoint.layout.structure import Path, walk
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError
from stager.workers.gc_pause import no_collection

MANIFEST_NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A small file hashed as a whole."""

    name: str
    nbytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """The facts of a checkpoint that are not about a single item.

    Attributes:
        linked_bytes: of files that were hard links to an earlier checkpoint's when this one was committed.
        generation: 0: all of it was written by its own save; else one more than the checkpoint that it was linked to.
    """

    kind: str
    step: int
    save_id: str
    created: float
    torch: str
    stager: str
    linked_bytes: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """Attributes:
    header: step, identity, versions.
    layout: files, items and structure.
    hashes: for each item, the hashes of its segments, hex.
    index_files: the files written at commit.
    """

    header: ManifestHeader
    layout: Layout
    hashes: tuple[tuple[str, ...], ...]
    index_files: tuple[IndexFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(f.nbytes for f in self.layout.files) + sum(f.nbytes for f in self.index_files)

    @property
    def file_names(self) -> set[str]:
        """Every file of the checkpoint, the manifest among them."""
        return {MANIFEST_NAME, *(f.name for f in self.layout.files), *(f.name for f in self.index_files)}

    def paths(self) -> Iterable[tuple[Path, int]]:
        """Each leaf of the state: its path and its item."""
        return walk(self.layout.structure)

    def count(self, kind: str) -> int:
        return sum(item.kind == kind for item in self.layout.items)

    def to_bytes(self) -> bytes:
        header, layout = self.header, self.layout
        head = json.dumps(
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
                "linked": [header.linked_bytes, header.generation],
                "files": [[f.name, f.nbytes] for f in layout.files],
                "index_files": [[f.name, f.nbytes, f.xxh3_128] for f in self.index_files],
                "columns": [*ROW_COLUMNS, "xxh3_128"],
            },
            separators=(",", ":"),
            allow_nan=False,
        )
        rows, structure = rows_json(layout, self.hashes), structure_json(layout)
        return seal_json(f'{head[:-1]},"rows":{rows},"structure":{structure}}}'.encode())


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a checkpoint directory (not the data files: see ``verify``).

    Raises:
        CheckpointNotFoundError: no directory or no manifest there.
        CorruptCheckpointError: the manifest is damaged, or says something impossible.
    """
    path = os.path.join(os.fspath(directory), MANIFEST_NAME)
    try:
        data = files.read_small(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(error.errno, "not a committed checkpoint: it has no manifest", path) from error
    except OSError as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error.strerror}") from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The checked content of a manifest; ``path`` is for error messages."""
    with no_collection():
        body = unseal(data, path)
    if not isinstance(body, dict) or body.get("format") != "stager":
        raise CorruptCheckpointError(path, "not a stager manifest")
    if body.get("version") != VERSION:
        raise CorruptCheckpointError(
            path,
            f"manifest version {body.get('version')!r}, and this stager reads version {VERSION}: install a newer stager",
        )
    try:
        with no_collection():
            return _build(body)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"says something impossible: {error!r}") from error


def _build(body: dict[str, Any]) -> Manifest:
    if body["columns"] != [*ROW_COLUMNS, "xxh3_128"]:
        raise ValueError("unknown columns")
    linked_bytes, generation = body.get("linked", (0, 0))
    header = ManifestHeader(
        kind=check_text(body["kind"]),
        step=check_step(body["step"]),
        save_id=check_text(body["save_id"]),
        created=check_time(body["created"]),
        torch=check_text(body["torch"]),
        stager=check_text(body["stager"]),
        linked_bytes=check_count(linked_bytes),
        generation=check_count(generation),
    )
    index_files = tuple(IndexFile(check_file_name(n), check_count(b), check_text(h)) for n, b, h in body["index_files"])
    layout = Layout(
        files=tuple(FileSpec(name, nbytes) for name, nbytes in body["files"]),
        items=tuple([Item.from_row(row[:-1]) for row in body["rows"]]),
        structure=body["structure"],
        segment_bytes=body["segment_bytes"],
    )
    check_layout(layout)
    check_distinct([MANIFEST_NAME, *(f.name for f in layout.files), *(f.name for f in index_files)])
    hashes = tuple([tuple(row[-1]) for row in body["rows"]])
    if set(map(type, itertools.chain.from_iterable(hashes))) - {str}:
        raise ValueError("a hash is not a string")
    step = layout.segment_bytes
    for index, (item, end) in enumerate(zip(layout.items, layout.ends(), strict=True)):
        span = end - item.offset
        if len(hashes[index]) != (1 if span <= step else num_segments(span, step)):
            raise ValueError(f"item {index}: wrong number of hashes")
    return Manifest(header, layout, hashes, index_files)
