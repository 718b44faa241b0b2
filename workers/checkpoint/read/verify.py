"""Verify that a checkpoint is what was committed: every byte of every file, or only names and sizes.

Full verification catches every changed or missing byte: the manifest is sealed, and its hashes cover every byte of every
file that it names. What lies beside these files does not count, unless the verification is strict (``own_files.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.documents.manifest import IndexFile, Manifest
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.storage import Fingerprint
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verification of one checkpoint found.

    Attributes:
        problems: one line each, with the file.
        strangers: names in the directory that the manifest does not name. They are problems only if it was strict.
        nbytes: size of the files that were checked (hashed, if full).
        step: in its manifest; None if the manifest cannot be read.
    """

    path: str
    ok: bool
    problems: tuple[str, ...]
    nbytes: int
    num_items: int
    secs: float
    step: int | None = None
    strangers: tuple[str, ...] = ()


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    full: bool = True,
    strict: bool = False,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check one checkpoint directory. Problems are returned, not raised.

    Args:
        path: the checkpoint (``.../step-00000100``).
        full: hash every byte; otherwise only the manifest's seal, names and sizes.
        strict: count what the manifest does not name as a problem, too.
        num_threads: default: the cores this process may use, at most 8.
        progress: called with the number of bytes just checked, from several threads.
    """
    started = time.monotonic()
    path = place_path(path, "the path of the checkpoint")
    problems: list[str] = []
    nbytes = num_items = 0
    step = None
    beside: tuple[str, ...] = ()
    try:
        with reading(path):
            manifest = read_manifest(path)
            nbytes, num_items, step = manifest.nbytes, len(manifest.layout.items), manifest.header.step
            beside = _unnamed(path, manifest)
            if strict:
                problems += [f"{os.path.join(path, name)}: does not belong to this checkpoint" for name in beside]
            problems += check_files(path, manifest, full=full, num_threads=num_threads, progress=progress)
    except (CorruptCheckpointError, CheckpointNotFoundError, StorageError) as error:
        problems.append(str(error))
    secs = time.monotonic() - started
    return VerifyReport(path, not problems, tuple(problems), nbytes, num_items, secs, step, beside)


def check_files(
    path: str,
    manifest: Manifest,
    *,
    full: bool,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the problems of the files that the manifest names. Arguments are those of :func:`verify_checkpoint`."""
    problems: list[str] = []
    progress = progress or (lambda nbytes: None)
    for index_file in manifest.index_files:
        try:
            read_index_file(path, manifest, index_file)
        except (CorruptCheckpointError, StorageError) as error:
            problems.append(str(error))
        if full:
            progress(index_file.nbytes)
    try:
        storage_of(path).check_data(path, manifest)
        with BlobReader(path, manifest, num_threads or _default_threads(), progress) as reader:
            if full:
                reader.read(range(len(manifest.layout.items)), on_error=lambda error: problems.append(str(error)))
    except (CorruptCheckpointError, StorageError) as error:
        problems.append(str(error))
    return problems


def fingerprint(path: str) -> Fingerprint:
    """Return what changes when a file of the checkpoint is written to or replaced, by its name.

    A checkpoint that was verified, and whose files have the same fingerprint, need not be verified again. (It misses a bit
    that flips on the disk, but readers check hashes anyway.)

    Raises:
        OSError: the directory cannot be listed, or a file vanishes meanwhile.
    """
    return storage_of(path).fingerprint(path)


def _unnamed(path: str, manifest: Manifest) -> tuple[str, ...]:
    with storage_errors("list", path):
        return tuple(sorted(set(storage_of(path).file_names(path)) - manifest.file_names))


def read_index_file(checkpoint: str, manifest: Manifest, expected: IndexFile) -> bytes:
    """Read a small file of a checkpoint, and check it.

    Args:
        checkpoint: its path.

    Raises:
        CorruptCheckpointError: it is not as it was written.
        StorageError: it cannot be read.
    """
    path = os.path.join(checkpoint, expected.name)
    with storage_errors("read", path):
        data = storage_of(checkpoint).read_file(checkpoint, manifest, expected.name)
    if len(data) != expected.nbytes:
        raise CorruptCheckpointError(path, f"is {len(data)} bytes long, should be {expected.nbytes}")
    if xxhash.xxh3_128_hexdigest(data) != expected.xxh3_128:
        raise CorruptCheckpointError(path, "is damaged: its xxh3 hash does not match")
    return data


def _default_threads() -> int:
    """Return how many threads read: one per usable core, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))
