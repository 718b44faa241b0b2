"""The directory of a run: its names, its lock, and which checkpoints are committed.

    <run>/step-00000100/                      a committed checkpoint
    <run>/step-00000100.partial-<save_id>/    being written, or left by a crash; never a checkpoint
    <run>/step-00000100.partial-<save_id>.replaced/   the checkpoint that this save replaces, for a moment, where the file
                                              system cannot exchange two names
    <run>/step-00000100.removing-<nonce>/     being removed, by retention or because its save failed
    <run>/step-00000100.strangers-<nonce>/    what somebody else had put into a directory that was removed (``own_files.py``)
    <run>/step-00000100.unfinished-<save_id>/   quarantined: parts did not arrive in time, and partners may have replicas
                                              of them (``stager/replication``)
    <run>/.stager.lock                        held (flock) by the trainer and its workers
    <run>/.stager.protected                   steps that retention keeps (``protected.py``)

NOTE [ The lock ]
The lock belongs to an open file description, which the trainer's workers inherit. It is released when the last of these
processes has ended. So a run that starts while workers of a killed trainer finish its last checkpoint waits for them, and
then sees that checkpoint. Several ranks of one run share it (``stager/ranks/opening.py``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.lost_manifest import file_of_ours
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, Manifest, has_own_manifest, read_manifest
from stager.workers.checkpoint.directory.paths import local_path
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, DirectoryInUseError, UsageError
from stager.workers.long_wait import LongWait

LOCK_NAME = ".stager.lock"

REPLACED = ".replaced"

_STEP = r"step-([0-9]{8}|[1-9][0-9]{8,})"  # as checkpoint_name() writes it: a step has one name
_COMMITTED = re.compile(_STEP)
_PARTIAL = re.compile(_STEP + r"\.partial-([0-9a-f]+)(?:\.replaced)?")
_REMOVING = re.compile(_STEP + r"\.removing-([0-9a-f]+)")
_UNFINISHED = re.compile(_STEP + r"\.unfinished-([0-9a-f]+)")


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
        )


@dataclass(frozen=True, slots=True)
class SkippedCheckpoint:
    """A directory that looks like a checkpoint but does not count as one: its name, and why."""

    name: str
    reason: str


def checkpoint_name(step: int) -> str:
    """Return the directory name of a committed checkpoint."""
    return f"step-{step:08d}"


def partial_name(step: int, save_id: str) -> str:
    """Return the name of a save's partial directory."""
    return f"{checkpoint_name(step)}.partial-{save_id}"


def removing_name(step: int, nonce: str) -> str:
    """Return the name that a checkpoint has while it is removed."""
    return f"{checkpoint_name(step)}.removing-{nonce}"


def removing_names(directory: str) -> list[str]:
    """Return the names of the directories whose removal has begun."""
    return sorted(filter(_REMOVING.fullmatch, _names(directory)))


def unfinished_name(step: int, save_id: str) -> str:
    """Return the name of a save's directory in quarantine."""
    return f"{checkpoint_name(step)}.unfinished-{save_id}"


def unfinished_saves(directory: str) -> list[tuple[int, str]]:
    """Return (step, save_id) of each save in quarantine, oldest step first."""
    matches = filter(None, map(_UNFINISHED.fullmatch, _names(directory)))
    return sorted((int(match[1]), match[2]) for match in matches)


def committed_steps(directory: str) -> list[int]:
    """Return the steps that have a checkpoint's directory, newest first. Reads names only."""
    return sorted((step for name in _names(directory) if (step := parse_checkpoint(name)) is not None), reverse=True)


def newest_nbytes(directory: str) -> int:
    """Return about how many bytes the newest checkpoint has, from its files' sizes; 0: there is none, or nobody knows."""
    for step in committed_steps(directory)[:1]:
        with suppress(OSError), os.scandir(os.path.join(directory, checkpoint_name(step))) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    return 0


def parse_checkpoint(name: str) -> int | None:
    """Return the step of a checkpoint's directory name; None for any other name."""
    match = _COMMITTED.fullmatch(name)
    return int(match[1]) if match is not None else None


def is_checkpoint_directory(path: str) -> bool:
    """Return whether ``path`` is one checkpoint, not a run: by its name, or because it was renamed and has our manifest.

    A ``manifest.json`` of another program does not count, nor does the name of a directory in which there are checkpoints.
    """
    if has_own_manifest(path):
        return True
    name = os.path.basename(path)
    named = any(pattern.fullmatch(name) for pattern in (_COMMITTED, _PARTIAL, _REMOVING))
    return named and not (os.path.isdir(path) and any(map(_COMMITTED.fullmatch, _names(path))))


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


def is_partial(name: str) -> bool:
    """Return whether ``name`` is a partial directory's."""
    return _PARTIAL.fullmatch(name) is not None


def parse_partial(name: str) -> tuple[int, str]:
    """Return (step, save_id) of a partial directory's name.

    Raises:
        ValueError: it is not a partial directory's name.
    """
    match = _PARTIAL.fullmatch(name)
    if match is None:
        raise ValueError(f"not a partial directory: {name}")
    return int(match[1]), match[2]


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
    return read_checkpoint_at(os.path.join(directory, checkpoint_name(step)), step)


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
    for step in committed_steps(directory):
        try:
            committed.append(read_checkpoint(directory, step)[0])
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            skipped.append(SkippedCheckpoint(checkpoint_name(step), str(error)))
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
