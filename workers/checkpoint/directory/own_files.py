"""Which files in a checkpoint's directory are stager's own, and which are strangers: what somebody else has put there.

A file browser leaves ``.DS_Store``, a user adds ``config.json``, a README, a link or a directory. The rule for strangers:

    a reader        does not look at them: what the manifest names decides whether a checkpoint is whole
    verify          notes them; they are problems only if it is asked to be strict
    a commit        leaves them where they are: they go with the directory when it gets its final name
    a removal       removes the own files. If strangers are left, the directory stays under a name that stands for nothing,
                    ``step-00000100.strangers-<nonce>``
    all of these    never follow a link
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress

from stager.workers.checkpoint.directory import files
from stager.workers.faults import point

STRANGERS = ".strangers-"

# Every file that stager has ever written into the directory of a step: data, indices, manifest, save records, receipts, and
# temporary files. Also the lock of a run, which earlier versions put into a checkpoint that was opened as a run; and what a
# network file system makes of a file that was removed while it was open.
_DATA = (
    r"__\d+_[0-9a-z]+\.distcp|state(-rank\d+)?(-\d+-of-\d+)?\.(pt|safetensors)|objects(-rank\d+)?\.bin"
    r"|\.nfs[0-9a-f]+|\.stager\.(lock|protected)"
)
_DOCUMENT = (
    r"manifest\.json|(__\d+)?\.metadata|state(-rank\d+)?\.safetensors\.index\.json|save-\d+\.json"
    r"|receipt-\d+-\d+-of-\d+\.json"
)
_OWN = re.compile(rf"{_DATA}|({_DOCUMENT})(\.\d+)?(\.tmp)?")


def is_own(name: str) -> bool:
    """Return whether a file in the directory of a step has a name that stager gives its files."""
    return _OWN.fullmatch(name) is not None


def own_files(directory_fd: int) -> list[str]:
    """Return the names of the own files in an open directory, sorted. Stager makes no directories there."""
    with os.scandir(directory_fd) as entries:
        return sorted(entry.name for entry in entries if is_own(entry.name) and not entry.is_dir(follow_symlinks=False))


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
            while names := own_files(directory_fd):
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


def _set_aside(path: str) -> str:
    parent, name = os.path.split(path)
    aside = os.path.join(parent, f"{name.partition('.')[0]}{STRANGERS}{secrets.token_hex(8)}")
    os.rename(path, aside)
    return aside
