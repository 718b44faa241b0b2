"""Verify that a checkpoint is what was committed: every byte of every file, or only names and sizes.

Full verification catches every changed, missing or extra byte or file: the manifest is sealed, and its hashes cover every
byte of every file that it names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from stager.workers.checkpoint.directory.files import read_small, storage_errors
from stager.workers.checkpoint.directory.manifest import IndexFile, Manifest, read_manifest
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.read.blob_reader import BlobReader, Wanted
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verification of one checkpoint found.

    Attributes:
        problems: one line each, with the file.
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


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    full: bool = True,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check one checkpoint directory. Problems are returned, not raised.

    Args:
        path: the checkpoint (``.../step-00000100``).
        full: hash every byte; otherwise only the manifest's seal, names and sizes.
        num_threads: default: the cores this process may use, at most 8.
        progress: called with the number of bytes just checked, from several threads.
    """
    started = time.monotonic()
    path = os.path.abspath(os.fspath(path))
    problems: list[str] = []
    nbytes = num_items = 0
    step = None
    try:
        with reading(path):
            manifest = read_manifest(path)
            nbytes, num_items, step = manifest.nbytes, len(manifest.layout.items), manifest.header.step
            problems += extra_files(path, manifest)
            problems += check_files(path, manifest, full=full, num_threads=num_threads, progress=progress)
    except (CorruptCheckpointError, CheckpointNotFoundError, StorageError) as error:
        problems.append(str(error))
    return VerifyReport(path, not problems, tuple(problems), nbytes, num_items, time.monotonic() - started, step)


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
            _check_index_file(os.path.join(path, index_file.name), index_file)
        except (CorruptCheckpointError, StorageError) as error:
            problems.append(str(error))
        if full:
            progress(index_file.nbytes)
    try:
        with BlobReader(path, manifest, num_threads or default_threads(), progress) as reader:
            if full:
                every_item = [Wanted(i, None) for i in range(len(manifest.layout.items))]
                reader.read(every_item, lambda error: problems.append(str(error)))
    except (CorruptCheckpointError, StorageError) as error:
        problems.append(str(error))
    return problems


def fingerprint(path: str) -> tuple[tuple[str, int, int, int, int], ...]:
    """Return name, inode, size, mtime and ctime (ns) of each file: they change when a file is written to or replaced.

    A checkpoint that was verified and has the same fingerprint need not be verified again. (It misses a bit that flips on
    the disk, but readers check hashes anyway.)

    Raises:
        OSError: a file is missing.
    """
    stats = [(name, os.lstat(os.path.join(path, name))) for name in sorted(os.listdir(path))]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def extra_files(path: str, manifest: Manifest) -> list[str]:
    """Return a problem for each file in the directory that does not belong to the checkpoint."""
    with storage_errors("list", path):
        extra = sorted(set(os.listdir(path)) - manifest.file_names)
    return [f"{os.path.join(path, name)}: does not belong to this checkpoint" for name in extra]


def _check_index_file(path: str, expected: IndexFile) -> None:
    with storage_errors("read", path):
        data = read_small(path)
    if len(data) != expected.nbytes:
        raise CorruptCheckpointError(path, f"is {len(data)} bytes long, should be {expected.nbytes}")
    if xxhash.xxh3_128_hexdigest(data) != expected.xxh3_128:
        raise CorruptCheckpointError(path, "is damaged: its xxh3 hash does not match")


def default_threads() -> int:
    """Return how many threads read: one per usable core, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))
