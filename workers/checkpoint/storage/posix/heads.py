"""The heads of manifests, remembered: a run looks at its names after each commit, and a manifest never changes."""

from __future__ import annotations

import os
import time
from functools import lru_cache

from stager.workers.checkpoint.documents.head import HEAD_BYTES, Head, parse_head
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError

_TICK_NS = 2_000_000_000  # the coarsest time stamps of file systems


def read_head(path: str) -> Head | None:
    """Return the head of the manifest in the directory ``path``; None: it cannot be read."""
    manifest = os.path.join(path, MANIFEST_NAME)
    try:
        stat = os.lstat(manifest)
    except OSError:
        return None
    # Of two manifests written in one tick of the clock, the second may have got inode and size of the first.
    if time.time_ns() - stat.st_mtime_ns < _TICK_NS:
        return _read(manifest)
    return _known(manifest, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _known(path: str, *_identity: int) -> Head | None:
    return _read(path)


def _read(path: str) -> Head | None:
    try:
        fd = files.open_regular(path, os.O_RDONLY)
    except (OSError, CorruptCheckpointError):
        return None
    try:
        return parse_head(os.pread(fd, HEAD_BYTES, 0))
    except OSError:
        return None
    finally:
        os.close(fd)
