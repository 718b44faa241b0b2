"""Is a checkpoint what was committed? Every byte of every file, or only names and sizes.

Full verification catches any changed, missing or extra byte or file: the manifest is sealed, and the hashes in it cover
every byte of every file it names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from workers.blob_reader import BlobReader, Wanted
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from workers.manifest import MANIFEST_NAME, IndexFile, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Attributes:
    path: the checkpoint.
    ok: nothing is wrong.
    problems: what is, one line each, with the file.
    nbytes: bytes that were looked at (hashed, when full).
    num_items: tensors and objects in it.
    secs: how long it took.
    """

    path: str
    ok: bool
    problems: tuple[str, ...]
    nbytes: int
    num_items: int
    secs: float


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    full: bool = True,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyResult:
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
    try:
        manifest = read_manifest(path)
        nbytes, num_items = manifest.nbytes, len(manifest.layout.items)
        problems += check_names(path, manifest)
        problems += [p for f in manifest.index_files if (p := _check_index_file(path, f)) is not None]
        threads = num_threads or default_threads()
        with BlobReader(path, manifest, threads, progress) as reader:
            if full:
                reader.read([Wanted(i, None) for i in range(num_items)], lambda e: problems.append(str(e)))
    except (CorruptCheckpointError, CheckpointNotFoundError, StorageError) as error:
        problems.append(str(error))
    return VerifyResult(path, not problems, tuple(problems), nbytes, num_items, time.monotonic() - started)


def check_names(path: str, manifest: Manifest) -> list[str]:
    """Files that are not in the manifest."""
    expected = {MANIFEST_NAME, *(f.name for f in manifest.layout.files), *(f.name for f in manifest.index_files)}
    extra = sorted(set(os.listdir(path)) - expected)
    return [f"{os.path.join(path, name)}: does not belong to this checkpoint" for name in extra]


def _check_index_file(path: str, expected: IndexFile) -> str | None:
    name = os.path.join(path, expected.name)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        return f"{name}: {error.strerror}"
    with open(fd, "rb") as file:
        if os.fstat(fd).st_size != expected.nbytes:
            return f"{name}: is {os.fstat(fd).st_size} bytes long, should be {expected.nbytes}"
        data = file.read(expected.nbytes)
    return None if xxhash.xxh3_128_hexdigest(data) == expected.xxh3_128 else f"{name}: its hash does not match"


def default_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))
