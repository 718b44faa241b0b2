"""The exported directory: there whole and synced, or not at all; and what it may replace.

An export lists its files in the metadata of each file of weights. Only a directory that has such a file, and nothing that
the file does not list, is replaced: whatever else somebody keeps in a directory is never removed.

While it is written, the directory has a temporary name, and whoever writes it holds its flock. An export that was killed
leaves the temporary directory without the lock. The next export to the same path removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stager.loading.safetensors_reader import metadata_of
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError, UsageError
from stager.workers.wording import first_of

MARKER = "stager.export"
"""The key of the metadata under which a file of weights lists all files of the export."""

_SHOWN_NAMES = 3


def refuse_if_taken(path: str, *, force: bool) -> None:
    """Raise unless an export may get this name. An empty directory is no obstacle.

    Args:
        path: absolute.
        force: an export of weights may have the name.

    Raises:
        UsageError: says what is there.
        StorageError
    """
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or not os.path.isdir(path):
        what = "a link" if os.path.islink(path) else "a file"
        raise UsageError(f"{path}: is {what}; name a directory, which need not exist")
    with storage_errors("list", path):
        names = set(os.listdir(path))
    if not names:
        return
    if (problem := _no_export(path, names)) is not None:
        raise UsageError(f"{path}: {problem}; name another directory")
    if not force:
        raise UsageError(
            f"{path}: exists already; name another directory, or replace this one with force=True (--force)"
        )


def _no_export(path: str, names: set[str]) -> str | None:
    """Say why a directory is no export of weights, or more than that; None: it is one."""
    weights = next((name for name in sorted(names) if name.endswith(".safetensors")), None)
    listed: Any = None
    if weights is not None:
        with suppress(CorruptCheckpointError, ValueError, TypeError, RecursionError):
            listed = json.loads(metadata_of(os.path.join(path, weights)).get(MARKER, ""))
    if not isinstance(listed, list):
        return f"has files in it ({first_of(sorted(names), _SHOWN_NAMES)}), which no export of weights wrote"
    others = sorted(names.difference(map(str, listed)))
    others = others or sorted(name for name in names if not os.path.isfile(os.path.join(path, name)))
    if others:
        return f"has more in it than the export that it was: {first_of(others, _SHOWN_NAMES)}; move that away"
    return None


@contextmanager
def new_directory(path: str, *, force: bool) -> Iterator[str]:
    """Make a new directory, and yield its temporary path. It gets its name when the block ends.

    If the block raises, the directory is removed with all that is in it. Whoever writes a file into it also syncs it.

    Args:
        path: absolute.
        force: replace an export of weights that has this name.

    Raises:
        UsageError: something else has this name.
        StorageError
    """
    refuse_if_taken(path, force=force)
    remove_abandoned(path)
    temporary = f"{path}.export-{secrets.token_hex(8)}.tmp"
    with storage_errors("write", path):
        os.mkdir(temporary)
        try:
            with _flock_of(temporary):  # without a lock, nobody takes it for abandoned either
                yield temporary
                files.sync_directory(temporary)
                _put_in_place(temporary, path, force)
                files.sync_directory(os.path.dirname(path))
        finally:
            with suppress(OSError):
                files.remove(temporary)  # what the block has left; or the export that was replaced


def remove_abandoned(path: str) -> None:
    """Remove what killed exports to ``path`` have left, if nobody writes it any more. What cannot be removed stays."""
    parent, name = os.path.split(path)
    temporary = re.compile(rf"{re.escape(name)}\.export-[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        for found in os.listdir(parent):
            if temporary.fullmatch(found) is not None:
                abandoned = os.path.join(parent, found)
                with suppress(OSError), _flock_of(abandoned) as is_ours:
                    if is_ours:
                        files.remove(abandoned)


@contextmanager
def _flock_of(directory: str) -> Iterator[bool]:
    """Take the flock of a directory, and hold it. Yields False if another process has it, or the file system has none."""
    directory_fd = files.open_directory(directory, follow=False)
    try:
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError:
            is_ours = False
        yield is_ours
    finally:
        os.close(directory_fd)


def _put_in_place(temporary: str, path: str, force: bool) -> None:
    try:
        os.rename(temporary, path)  # replaces nothing but an empty directory, also if something came meanwhile
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        refuse_if_taken(path, force=force)
        if not files.exchange(temporary, path):
            _replace_in_two_steps(temporary, path)


def _replace_in_two_steps(temporary: str, path: str) -> None:
    """Replace a directory where the file system cannot exchange two names. A crash between the steps leaves both."""
    former = f"{path}.{os.getpid()}.former"
    os.rename(path, former)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(former, path)
        raise
    files.remove(former)
