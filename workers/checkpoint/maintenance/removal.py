"""Remove checkpoints, after ``retention.py`` has decided which.

NOTE [ How a checkpoint is removed ]
    1. Take its directory's lock exclusively, without waiting. Refused: somebody reads it, so it stays.
    2. Rename step-N to step-N.removing-<nonce>, and release the lock.
    3. When all are renamed, sync the parent directory. Without it, a power failure could bring back names without files.
    4. Unlink the files, then the directory.
A crash before 2 changes nothing. After it, the name is not a checkpoint's, and the next prune or recover goes on with 4.
Files that other checkpoints share (incremental saves) only lose a name. Two processes may prune at once: the second one
finds that a name is gone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import is_still, storage_errors
from stager.workers.checkpoint.directory.protected import read_protected
from stager.workers.checkpoint.directory.run_directory import removing_name
from stager.workers.errors import StorageError
from stager.workers.faults import point


class PruneFate(Enum):
    """What became of a checkpoint."""

    KEPT = "kept"
    REMOVED = "removed"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class PruneVerdict:
    """What became of one checkpoint, or would become of it in a dry run.

    Attributes:
        step, path: which.
        fate: KEPT by the rules; REMOVED; or LEFT: no rule keeps it, but it could not be removed, or it is damaged.
        reason: why.
        damaged: it was found to be damaged.
    """

    step: int
    path: str
    fate: PruneFate
    reason: str
    damaged: bool = False


def remove(directory: str, doomed: list[PruneVerdict]) -> tuple[dict[int, PruneVerdict], int]:
    """Remove checkpoints: NOTE [ How a checkpoint is removed ]. Returns final verdicts by step, and the bytes freed."""
    verdicts: dict[int, PruneVerdict] = {}
    renamed: dict[int, str] = {}
    for verdict in doomed:
        try:
            outcome = _take_name(directory, verdict)
        except StorageError as error:
            outcome = _left(verdict, str(error))
        if isinstance(outcome, PruneVerdict):
            verdicts[verdict.step] = outcome
        else:
            renamed[verdict.step] = outcome
    if renamed:
        with storage_errors("sync", directory):
            files.sync_directory(directory)  # step 3: before any file is unlinked
    point("prune.renamed")
    freed_bytes = exclusive_bytes(renamed.values())
    for verdict in doomed:
        if verdict.step in renamed:
            try:
                delete(renamed[verdict.step])
                verdicts[verdict.step] = verdict
            except StorageError as error:
                verdicts[verdict.step] = _left(
                    verdict, f"it was renamed, but not all its files could be removed: {error}"
                )
    point("prune.removed")
    return verdicts, freed_bytes


def _left(verdict: PruneVerdict, reason: str) -> PruneVerdict:
    return PruneVerdict(verdict.step, verdict.path, PruneFate.LEFT, reason)


def _take_name(directory: str, verdict: PruneVerdict) -> str | PruneVerdict:
    """Do steps 1 and 2. Returns the new path, or the verdict why it stays."""
    path = verdict.path
    with storage_errors("remove", path):
        try:
            directory_fd = files.open_directory(path, follow=False)
        except FileNotFoundError:
            return PruneVerdict(verdict.step, path, PruneFate.REMOVED, "somebody else removed it")
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_still(path, directory_fd):
                return _left(verdict, "it was replaced just now")
            if verdict.step in read_protected(
                directory
            ):  # asked again under the lock, which protecting a step holds, too
                return PruneVerdict(verdict.step, path, PruneFate.KEPT, "protected")
            aside = os.path.join(directory, removing_name(verdict.step, secrets.token_hex(8)))
            os.rename(path, aside)
            # A commit that replaces it waits for our lock, but only for seconds: we may have been stopped for longer.
            if not is_still(aside, directory_fd):
                os.rename(aside, path)
                return _left(verdict, "it was replaced just now")
        except BlockingIOError:
            return _left(verdict, "it is being read")
        finally:
            os.close(directory_fd)
    return aside


def delete(path: str) -> None:
    """Remove a renamed checkpoint: step 4.

    Raises:
        StorageError
    """
    with storage_errors("remove", path):
        with suppress(FileNotFoundError, NotADirectoryError):  # a link to a directory is removed, not followed
            _unlink_all(files.open_directory(path, follow=False))
        files.remove(path)


def _unlink_all(directory_fd: int) -> None:
    try:
        for name in sorted(os.listdir(directory_fd)):
            point("prune.removing")
            with suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(name, dir_fd=directory_fd)
    finally:
        os.close(directory_fd)


def exclusive_bytes(paths: Iterable[str]) -> int:
    """Return the bytes that removing these directories frees: of files that have no name elsewhere."""
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    for path in paths:
        try:
            stats = [entry.stat(follow_symlinks=False) for entry in os.scandir(path)]
        except OSError:  # somebody removes it at this moment
            continue
        for stat in stats:
            identity = (stat.st_dev, stat.st_ino)
            count = seen[identity][0] + 1 if identity in seen else 1
            seen[identity] = (count, stat.st_nlink, stat.st_size)
    return sum(nbytes for count, links, nbytes in seen.values() if count >= links)
