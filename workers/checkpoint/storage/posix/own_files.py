"""Which files in a checkpoint's directory are stager's own, and which are strangers: what somebody else has put there.

A file browser leaves ``.DS_Store``, a user adds ``config.json``, a README, a link or a directory. The rule for strangers:

    a reader        does not look at them: what the manifest names decides whether a checkpoint is whole
    verify          notes them; they are problems only if it is asked to be strict
    a commit        leaves them where they are: they go with the directory when it gets its final name
    a removal       removes the own files, and the sidecars that the manifest names. If strangers are left, the directory
                    stays under a name that stands for nothing, ``step-00000100.strangers-<nonce>``
    all of these    never follow a link
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from contextlib import suppress

from stager.workers.checkpoint.documents.envelope import is_intact
from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError
from stager.workers.faults import point

STRANGERS = ".strangers-"

_SET_ASIDE_ENDING = re.compile(r"\.(?:partial|removing|unfinished|strangers)-[0-9a-f]+(?:\.replaced)?$")
_NAMES_SIDECARS = re.compile(r"manifest\.json|save-\d+\.json")
_SIDECARS = b',"sidecars":'  # a text in JSON cannot have it: its quotation marks are escaped


def own_files(directory_fd: int) -> list[str]:
    """Return the names of the own files in an open directory, sorted. Stager makes no directories there.

    The sidecars are not among them: only the manifest, or the save record, tells which they are.
    """
    with os.scandir(directory_fd) as entries:
        return sorted(entry.name for entry in entries if is_own(entry.name) and not entry.is_dir(follow_symlinks=False))


def sidecars_in(directory_fd: int, directory: str) -> set[str]:
    """Return the names of the sidecars in an open directory, as a document there names them that is whole.

    Args:
        directory: its path, for messages.
    """
    named: set[str] = set()
    for document in filter(_NAMES_SIDECARS.fullmatch, own_files(directory_fd)):
        with suppress(OSError, CorruptCheckpointError):
            data = files.read_small(os.path.join(directory, document))
            named.update(_sidecars_of(data))
    if not named:
        return named
    with os.scandir(directory_fd) as entries:
        return {entry.name for entry in entries if entry.name in named and not entry.is_dir(follow_symlinks=False)}


def _sidecars_of(data: bytes) -> list[str]:
    """Return the sidecars' names that a manifest, or a save record, has at its head."""
    start = data.find(_SIDECARS)
    if start < 0 or not is_intact(data):  # most have none: then nothing is hashed or parsed
        return []
    text = data[start + len(_SIDECARS) :].decode()
    rows, _ = json.JSONDecoder().raw_decode(text)  # names; in a record with size and hash
    return [row if isinstance(row, str) else row[0] for row in rows]


def remove_own(path: str) -> str | None:
    """Remove the directory of a step, if it exists, and every own file in it. Another process may do so at the same time.

    A file or a link that has the name of a directory of ours is removed, too; the link is not followed.

    Returns:
        The new path of the directory if strangers are left in it; else None.

    Raises:
        OSError
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return None
        directory_fd = files.open_directory(path, follow=False)
        try:
            # Again, because another process may write its own files there meanwhile.
            while names := _in_order(directory_fd, path):
                for name in names:
                    point("prune.removing")
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=directory_fd)
            has_strangers = bool(os.listdir(directory_fd))
        finally:
            os.close(directory_fd)
        if has_strangers:
            return _set_aside(path)
        os.rmdir(path)
    return None


def _in_order(directory_fd: int, path: str) -> list[str]:
    """Return what is to be removed. What names the sidecars goes last: after a crash, they are still known."""
    own, sidecars = own_files(directory_fd), sidecars_in(directory_fd, path)
    return [*sorted({*own, *sidecars}, key=lambda name: (_NAMES_SIDECARS.fullmatch(name) is not None, name))]


def _set_aside(path: str) -> str:
    parent, name = os.path.split(path)
    aside = os.path.join(parent, f"{_SET_ASIDE_ENDING.sub('', name)}{STRANGERS}{secrets.token_hex(8)}")
    os.rename(path, aside)
    return aside
