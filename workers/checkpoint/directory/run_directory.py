"""The directory of a run: its names, its lock, and which checkpoints are committed.

    <run>/<name>/                             a committed checkpoint; ``names.py`` has the names, and what else there is
    <run>/.stager.lock                        held (flock) by the trainer and its workers
    <run>/.stager.protected                   steps that retention keeps (``protected.py``)

NOTE [ The lock ]
The lock belongs to an open file description. Each write task has a duplicate of its descriptor, so that a worker holds
the lock as long as it has the task. It is released when the trainer and the last of these tasks have ended. So a run
that starts while workers of a killed trainer finish its last checkpoint waits for them, and then sees that checkpoint.
Several ranks of one run share it (``stager/ranks/opening.py``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from stat import S_ISDIR
from typing import NamedTuple

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.lost_manifest import file_of_ours
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, Manifest, has_own_manifest, read_manifest
from stager.workers.checkpoint.directory.names import (
    checkpoint_name,
    is_partial,
    is_removing,
    may_be_checkpoint,
    number_in,
    parse_checkpoint,
    parse_unfinished,
)
from stager.workers.checkpoint.directory.paths import local_path
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, DirectoryInUseError, UsageError
from stager.workers.long_wait import LongWait

LOCK_NAME = ".stager.lock"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        nbytes: size of its files.
        created: when the snapshot was taken, unix time.
        save_id: unique.
        num_tensors, num_objects: what is in it; tied tensors count once.
        linked_bytes: of ``nbytes``, what was linked to an earlier checkpoint's files and not written (incremental saves).
        metrics: as they were given to ``save()``.
        files: names of the files that were given to ``save()``, or that another program has named.
    """

    step: int
    path: str
    nbytes: int
    created: float
    save_id: str
    num_tensors: int
    num_objects: int
    format: str
    linked_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict, hash=False)
    files: tuple[str, ...] = ()

    @staticmethod
    def of(path: str, manifest: Manifest) -> CheckpointInfo:
        """Make the info of the checkpoint at ``path`` from its manifest."""
        header = manifest.header
        return CheckpointInfo(
            step=header.step,
            path=path,
            nbytes=manifest.nbytes,
            created=header.created,
            save_id=header.save_id,
            num_tensors=manifest.count("tensor"),
            num_objects=manifest.count("object"),
            format=header.kind,
            linked_bytes=header.linked_bytes,
            metrics=dict(header.metrics),
            files=header.sidecars,
        )


@dataclass(frozen=True, slots=True)
class SkippedCheckpoint:
    """A directory that looks like a checkpoint but does not count as one.

    Attributes:
        name: of the directory.
        reason: why it does not count.
        step: of a checkpoint that was committed and cannot be used; None: it was never committed, or is being removed.
    """

    name: str
    reason: str
    step: int | None = None


class Head(NamedTuple):
    """What the first bytes of a manifest say; for the fields see :class:`ManifestHeader`."""

    name: str
    run: str
    number: int
    step: int
    created: float


# As ``Manifest.to_bytes`` writes it, behind the seal.
_HEAD = re.compile(
    rb'[^{]*{[^{]*{"format":"stager","version":\d+,(?:"name":("(?:[^"\\]|\\.)*"),)?'
    rb'(?:"order":\["(\w*)",(\d{1,19})\],)?"kind":"\w+","step":(\d{1,19}),"save_id":"\w*","created":([0-9.e+-]+),'
)
_HEAD_BYTES = 4096
_TICK_NS = 2_000_000_000  # the coarsest time stamps of file systems


def checkpoint_names(directory: str) -> dict[int, str]:
    """Return the name of each step's checkpoint, newest step first.

    Default names are only read. Of directories with other names, the first bytes of the manifest are read: one counts if its
    manifest has its name. Renamed ones and copies do not count. Of two checkpoints of one step, the later one counts.
    """
    found: dict[int, str] = {}
    for name in _names(directory):
        step = parse_checkpoint(name)
        if step is None:
            step = _step_of_other(directory, name)
            if step is None:
                continue
        rival = found.get(step)
        if rival is None or _created(directory, name) > _created(directory, rival):
            found[step] = name
    return dict(sorted(found.items(), reverse=True))


def _step_of_other(directory: str, name: str) -> int | None:
    """Return the step of a checkpoint whose name is not the default one; None if ``name`` is no checkpoint."""
    if not may_be_checkpoint(name):
        return None
    path = os.path.join(directory, name)
    head = read_head(path)
    if head is not None:
        return head.step if head.name == name else None
    # A manifest that is damaged or lost must not make a checkpoint vanish: whoever reads it reports that.
    number = number_in(name)
    return number if number is not None and _has_file_of_ours(path) else None


def _created(directory: str, name: str) -> float:
    head = read_head(os.path.join(directory, name))
    return -math.inf if head is None else head.created


def read_head(path: str) -> Head | None:
    """Return what the first bytes of a checkpoint's manifest say, unchecked; None: it cannot be read."""
    manifest = os.path.join(path, MANIFEST_NAME)
    try:
        stat = os.lstat(manifest)
    except OSError:
        return None
    # Of two manifests written in one tick of the clock, the second may have got inode and size of the first.
    if time.time_ns() - stat.st_mtime_ns < _TICK_NS:
        return _read_head(manifest)
    return _known_head(manifest, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)  # a run looks at its names after each commit, and a manifest never changes
def _known_head(path: str, *_identity: int) -> Head | None:
    return _read_head(path)


def _read_head(path: str) -> Head | None:
    try:
        fd = files.open_regular(path, os.O_RDONLY)
    except (OSError, CorruptCheckpointError):
        return None
    try:
        match = _HEAD.match(os.pread(fd, _HEAD_BYTES, 0))
        if match is None:
            return None
        name, run, number, step, created = match.groups()
        name = "" if name is None else json.loads(name)
        return Head(name, (run or b"").decode(), int(number or 0), int(step), float(created))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def _has_file_of_ours(path: str) -> bool:
    try:
        stat = os.lstat(path)
    except OSError:
        return False
    return S_ISDIR(stat.st_mode) and _shows_file_of_ours(path, stat.st_ino, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _shows_file_of_ours(path: str, *_identity: int) -> bool:
    return file_of_ours(path) is not None


def committed_steps(directory: str) -> list[int]:
    """Return the steps that have a checkpoint's directory, newest first."""
    return list(checkpoint_names(directory))


def name_of(directory: str, step: int) -> str:
    """Return the name of a step's checkpoint; the default name if there is none."""
    return checkpoint_names(directory).get(step, checkpoint_name(step))


def path_of(directory: str, step: int) -> str:
    """Return the path of a step's checkpoint, as :func:`name_of` has its name."""
    return os.path.join(directory, name_of(directory, step))


def newest_nbytes(directory: str) -> int:
    """Return about how many bytes the newest checkpoint has, from its files' sizes; 0: there is none, or nobody knows."""
    for name in islice(checkpoint_names(directory).values(), 1):
        with suppress(OSError), os.scandir(os.path.join(directory, name)) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    return 0


def removing_names(directory: str) -> list[str]:
    """Return the names of the directories whose removal has begun."""
    return sorted(filter(is_removing, _names(directory)))


def unfinished_saves(directory: str) -> list[tuple[str, str]]:
    """Return (name of the checkpoint, save_id) of each save in quarantine, oldest step first."""
    found = filter(None, map(parse_unfinished, _names(directory)))
    return sorted(found, key=lambda save: (number_in(save[0]) or 0, save))


def is_checkpoint_directory(path: str) -> bool:
    """Return whether ``path`` is one checkpoint, not a run: by its name, or because it was renamed and has our manifest.

    A ``manifest.json`` of another program does not count, nor does the name of a directory in which there are checkpoints.
    """
    if has_own_manifest(path):
        return True
    name = os.path.basename(path)
    named = parse_checkpoint(name) is not None or is_partial(name) or is_removing(name)
    return named and not (os.path.isdir(path) and bool(checkpoint_names(path)))


def require_run_directory(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a run's directory.

    Raises:
        CheckpointNotFoundError: ``path`` is not a directory.
        UsageError: ``path`` is one checkpoint, or is no path.
    """
    path = local_path(path)
    if not os.path.isdir(path):
        reason = "is not a directory" if os.path.exists(path) else "no such directory"
        raise CheckpointNotFoundError(None, reason, path)
    if is_checkpoint_directory(path):
        raise UsageError(f"{path} is one checkpoint; name the run's directory")
    return path


def partial_names(directory: str) -> list[str]:
    """Return the names of partial directories; ``REPLACED`` checkpoints come after their replacements."""
    return sorted(filter(is_partial, _names(directory)))


def _names(directory: str) -> list[str]:
    with storage_errors("list", directory):
        try:
            return os.listdir(directory)
        except FileNotFoundError:
            return []


def read_checkpoint(directory: str, step: int) -> tuple[CheckpointInfo, Manifest]:
    """Read the manifest of the checkpoint of ``step``.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: its manifest is damaged, or was lost, or is another step's.
    """
    return read_checkpoint_at(path_of(directory, step), step)


def read_checkpoint_at(path: str, step: int) -> tuple[CheckpointInfo, Manifest]:
    """Read the manifest of the checkpoint of ``step`` at ``path``. Raises as :func:`read_checkpoint`."""
    try:
        manifest = read_manifest(path)
    except CheckpointNotFoundError as error:
        kept = file_of_ours(path)
        if kept is None or os.path.lexists(os.path.join(path, MANIFEST_NAME)):  # committed between the two looks
            raise
        raise CorruptCheckpointError(
            os.path.join(path, MANIFEST_NAME),
            f"is missing, although this checkpoint was committed: {kept} is still there "
            f"(load_checkpoint({path!r}) reads the checkpoint unverified)",
        ) from error
    if manifest.header.step != step:
        raise CorruptCheckpointError(path, f"its manifest is of step {manifest.header.step}: the directory was renamed")
    return CheckpointInfo.of(path, manifest), manifest


def list_checkpoints(directory: str | os.PathLike[str]) -> tuple[list[CheckpointInfo], list[SkippedCheckpoint]]:
    """Return the committed checkpoints, oldest first, and what was skipped. Reads manifests, but no data files."""
    directory = local_path(directory)
    committed: list[CheckpointInfo] = []
    skipped = [
        SkippedCheckpoint(name, "partial: it was not committed, or is being written now")
        for name in partial_names(directory)
    ]
    skipped += [SkippedCheckpoint(name, "being removed") for name in removing_names(directory)]
    for step, name in checkpoint_names(directory).items():
        try:
            committed.append(read_checkpoint_at(os.path.join(directory, name), step)[0])
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            skipped.append(SkippedCheckpoint(name, str(error), step))
    return committed[::-1], skipped


def lock_directory(directory: str, timeout: float, nonce: str = "", *, shared: bool = False) -> int:
    """Take the run's lock; returns its descriptor. See NOTE [ The lock ].

    Args:
        timeout: seconds.
        nonce: of the run; written into the lock file, where the run's other ranks read it.
        shared: take the lock shared, as one of several ranks.

    Raises:
        DirectoryInUseError: another run still holds it after ``timeout`` seconds.
        StorageError: the lock file cannot be created.
    """
    path = os.path.join(directory, LOCK_NAME)
    with storage_errors("lock", path):
        # O_NOFOLLOW: the file is truncated below, so it had better be the one in this directory.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _acquire(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, directory, timeout)
            # Only under the exclusive lock: the other ranks read what its holder wrote.
            if not shared:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} {nonce}".rstrip().encode() + b"\n", 0)
        except BaseException:
            os.close(fd)
            raise
    return fd


def share_lock(fd: int, directory: str) -> None:
    """Turn an exclusive lock of the run into a shared one, so that its other ranks can take it, too.

    Raises:
        DirectoryInUseError: another run took the lock in between: the kernel releases the old lock before it takes the new.
    """
    with storage_errors("lock", os.path.join(directory, LOCK_NAME)):
        _acquire(fd, fcntl.LOCK_SH, directory)


@contextmanager
def unused_directory(directory: str) -> Iterator[None]:
    """Hold the run's lock for a reader that changes nothing; not even the lock file is created.

    Raises:
        DirectoryInUseError: a run holds the lock, alone or shared by its ranks.
    """
    path = os.path.join(directory, LOCK_NAME)
    with ExitStack() as opened:
        with storage_errors("lock", path), suppress(FileNotFoundError):  # no run has been here
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            opened.callback(os.close, fd)
            _acquire(fd, fcntl.LOCK_EX, directory)
        yield


def _acquire(fd: int, kind: int, directory: str, timeout: float = 0) -> None:
    holder = f"the run of process {_holder(fd)}, or workers that it left, to let go of {directory}"
    if files.flock(fd, kind, timeout, LongWait(holder, timeout).tick):
        return
    waited = f" after {timeout:g} s" if timeout else ""
    raise DirectoryInUseError(
        errno.EWOULDBLOCK,
        f"another run (trainer process {_holder(fd)}, or workers that it left) still writes checkpoints here{waited}; "
        "wait for it, or stop it. A Checkpointer can use another directory, or open this one with read_only=True",
        directory,
    )


def _holder(fd: int) -> str:
    """Return the process that the lock file names."""
    return os.pread(fd, 32, 0).decode(errors="replace").partition(" ")[0].strip() or "unknown"
