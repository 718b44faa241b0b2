"""Which storage keeps a path."""

from __future__ import annotations

from stager.workers.checkpoint.storage.contract import Storage
from stager.workers.checkpoint.storage.posix.file_system import FileSystem

_FILE_SYSTEM = FileSystem()


def storage_of(path: str) -> Storage:
    """Return the storage that keeps ``path``, which is absolute, or a URL."""
    return _FILE_SYSTEM
