"""Checkpoints that have lost their manifest: somebody removed or moved the file after the commit.

A checkpoint's directory gets its final name with the manifest in it, and loses that name before anything in it is removed.
So a directory ``step-00000100`` without a manifest is damaged, if stager made it. ``dcp.save`` and users make directories of
that name, too. What only stager writes:

    __0_objects.distcp          pickled objects in the dcp format
    .metadata                   with a save id of 16 hexadecimal digits; torch's ids are UUIDs
    objects.bin                 pickled objects in the safetensors format
    state.safetensors           by its name
    state.pt                    an archive without the serialization id that torch.save gives
"""

from __future__ import annotations

import os
import re
import zipfile
from functools import lru_cache

from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError

_BY_NAME = re.compile(
    r"__\d+_objects\.distcp|objects(-rank\d+)?\.bin|state(-rank\d+)?(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
_TORCH = re.compile(r"state(-rank\d+)?\.pt")
_METADATA = ".metadata"
_SAVE_ID = re.compile(rb"(?:\x8c\x10|X\x10\x00\x00\x00)[0-9a-f]{16}")  # a pickled text of 16 digits
_TORCH_ROOT = "archive"
_TORCH_ID = ".data/serialization_id"


def file_of_ours(directory: str) -> str | None:
    """Return the name of a file that shows that stager committed the directory; None: there is none."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:  # it is gone, or no directory
        return None
    return next((name for name in names if _is_ours(directory, name)), None)


def _is_ours(directory: str, name: str) -> bool:
    if name != _METADATA and _TORCH.fullmatch(name) is None:
        return _BY_NAME.fullmatch(name) is not None
    path = os.path.join(directory, name)
    try:
        stat = os.lstat(path)
    except OSError:
        return False
    # Remembered while the file does not change: a run looks at its names after each commit.
    return _shows_us(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _shows_us(path: str, *_identity: int) -> bool:
    return _has_save_id(path) if os.path.basename(path) == _METADATA else _is_own_archive(path)


def _has_save_id(path: str) -> bool:
    try:
        return _SAVE_ID.search(files.read_small(path)) is not None
    except (OSError, CorruptCheckpointError):
        return False


def _is_own_archive(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return f"{_TORCH_ROOT}/data.pkl" in names and f"{_TORCH_ROOT}/{_TORCH_ID}" not in names
