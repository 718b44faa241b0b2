"""Reading the manifest of a checkpoint, wherever it is kept."""

from __future__ import annotations

import os

from stager.workers.checkpoint.documents.envelope import is_sealed
from stager.workers.checkpoint.documents.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestHeader,
    parse_header,
    parse_manifest,
)
from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError

_NOT_OF_A_CHECKPOINT = (MANIFEST_NAME, ".stager.lock", ".stager.protected")  # what a run has, too


def has_manifest(path: str) -> bool:
    """Return whether there is a manifest in the directory ``path``."""
    return storage_of(path).has_manifest(path)


def has_own_manifest(directory: str | os.PathLike[str]) -> bool:
    """Return whether ``directory`` has a manifest of stager's, whole or damaged, and not another program's file.

    A manifest whose first bytes are damaged is known by the checkpoint's other files.

    Raises:
        StorageError: an object store does not answer. What is wrong with a file system is for whoever reads there to tell.
    """
    path = os.fspath(directory)
    storage = storage_of(path)
    try:
        data = storage.read_manifest(path)
        names = () if is_sealed(data) else storage.file_names(path)
        return is_sealed(data) or any(is_own(name) for name in names if name not in _NOT_OF_A_CHECKPOINT)
    except StorageError:  # an object store that does not answer
        raise
    except (OSError, CorruptCheckpointError):
        return False


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a checkpoint directory (not the data files: see ``verify``).

    Raises:
        CheckpointNotFoundError: no directory or no manifest there.
        CorruptCheckpointError: the manifest is damaged, or contradicts itself.
    """
    return parse_manifest(*_read(directory))


def read_header(directory: str | os.PathLike[str]) -> ManifestHeader:
    """Read the facts of a checkpoint, and nothing about its items. Raises as :func:`read_manifest`."""
    return parse_header(*_read(directory))


def _read(directory: str | os.PathLike[str]) -> tuple[bytes, str]:
    path = os.path.join(os.fspath(directory), MANIFEST_NAME)
    try:
        return storage_of(path).read_manifest(os.path.dirname(path)), path
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(error.errno, "not a committed checkpoint: it has no manifest", path) from error
    except OSError as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error.strerror}") from error
