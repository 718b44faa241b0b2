"""Which storage keeps a path."""

from __future__ import annotations

import os

from stager.workers.checkpoint.storage.objects.object_store import ObjectStore
from stager.workers.checkpoint.storage.paths import OBJECT_STORE_URL
from stager.workers.checkpoint.storage.posix.file_system import FileSystem
from stager.workers.checkpoint.storage.storage import Storage

_FILE_SYSTEM, _OBJECT_STORE = FileSystem(), ObjectStore()


def storage_of(path: str) -> Storage:
    """Return the storage that keeps ``path``, which is absolute, or a URL."""
    return _OBJECT_STORE if is_url(path) else _FILE_SYSTEM


def is_url(path: str) -> bool:
    """Return whether ``path`` is the URL of something in an object store."""
    return OBJECT_STORE_URL.fullmatch(path) is not None


def resolved(path: str) -> str:
    """Return an absolute path without symbolic links in it; a URL as it is."""
    return path if is_url(path) else os.path.realpath(path)
