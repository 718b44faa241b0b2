"""What a worker does with its part of a save: reconstruct the bytes from the slab, hash, write, sync, leave a receipt.

Every step can be done again by another worker after a crash: the same bytes go to the same places.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from stager.workers.checkpoint.commit.commit import Committed, already_committed, partial_path, try_commit, vanished
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import is_still, storage_errors
from stager.workers.checkpoint.directory.receipt import Receipt, read_receipt
from stager.workers.checkpoint.directory.run_directory import partial_name, removing_name, unfinished_name
from stager.workers.checkpoint.layout.layout import Layout, partition_once
from stager.workers.checkpoint.layout.plan_cache import no_collection
from stager.workers.checkpoint.write.part_writer import PartWriter
from stager.workers.checkpoint.write.save_record import record_name, to_record
from stager.workers.checkpoint.write.unchanged_files import reuse, sync_linked, whole_files
from stager.workers.checkpoint.write.write_task import WriteTask, read_layout
from stager.workers.faults import point
from stager.workers.memory.attached import detach_all_but

_OPEN_ATTEMPTS = 10
_DISCARD_SECS = 10.0
_POLL_SECS = 0.02


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a part's task returns: its receipt's times and note, and the commit if this part completed the set."""

    part: int
    pid: int
    started: float
    written: float
    synced: float
    committed: Committed | None
    note: str = ""


def persist_part(task: WriteTask, part: int) -> PartResult:
    """Write part ``part`` of ``task``; commit if it was the last one.

    Raises:
        StorageError: a system call failed; nothing that looks like a checkpoint is left.
        CorruptCheckpointError: somebody else writes into the partial directory.
    """
    detach_all_but(task.live_slabs)
    with (
        storage_errors("save", partial_path(task.spec)),
        no_collection(),
    ):  # the last net: what is below says more precisely what failed
        point("part.begin")
        layout = read_layout(task)
        done = _write_part(task, layout, part)
        if isinstance(done, Committed):
            return PartResult(part, os.getpid(), done.started, done.started, done.started, done)
        committed = try_commit(task.spec, layout)
    return PartResult(part, done.pid, done.started, done.written, done.synced, committed, done.note)


def prepare_worker() -> int:
    """Nothing but proof that this worker is up."""
    return os.getpid()


def discard_partial(directory: str, step: int, save_id: str) -> None:
    """Remove what a failed save left, unless it is committed after all. Runs in a worker, when no part of this rank's runs
    any more.

    Another rank may still write its part, or be about to commit. So the directory loses its name first, in one step: from
    then on it cannot be committed (or it was just before, and there is nothing to remove). Who still writes to it is waited
    for. If that takes too long, it is left to that rank, whose part then fails, or to the next run.
    """
    partial = os.path.join(directory, partial_name(step, save_id))
    removed = os.path.join(directory, removing_name(step, save_id))
    with storage_errors("remove", partial):
        with suppress(FileNotFoundError):  # committed, or another rank was first
            removed = _rename_away(partial, removed)
        _remove_when_alone(removed)


def quarantine(directory: str, step: int, save_id: str) -> None:
    """Keep what there is of a save that is given up, under a name from which nobody commits it. Nothing, if it was committed
    after all."""
    partial = os.path.join(directory, partial_name(step, save_id))
    kept = os.path.join(directory, unfinished_name(step, save_id))
    with storage_errors("rename", partial):
        try:
            os.rename(partial, kept)
        except FileNotFoundError:  # committed, or another rank was first
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            discard_partial(directory, step, save_id)  # a rank that began late has made a new one


def discard_unfinished(directory: str, step: int, save_id: str) -> None:
    """What :func:`quarantine` kept is not needed any more."""
    path = os.path.join(directory, unfinished_name(step, save_id))
    with storage_errors("remove", path):
        _remove_when_alone(path)


def _rename_away(partial: str, removed: str) -> str:
    try:
        os.rename(partial, removed)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        removed += secrets.token_hex(4)  # a rank that began late has made a new one
        os.rename(partial, removed)
    return removed


def _remove_when_alone(path: str) -> None:
    try:
        directory_fd = files.open_directory(path, follow=False)
    except FileNotFoundError:
        return
    except OSError:  # no directory: whatever it is, it goes
        files.remove(path)
        return
    try:
        if _lock_alone(directory_fd):
            files.remove(path)
    finally:
        os.close(directory_fd)


def _lock_alone(directory_fd: int) -> bool:
    deadline = time.monotonic() + _DISCARD_SECS
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(_POLL_SECS)
    return False


def _write_part(task: WriteTask, layout: Layout, part: int) -> Receipt | Committed:
    """The part's receipt; or the commit, when this task was run before and the save needed no more than that."""
    spec, partial = task.spec, partial_path(task.spec)
    directory_fd = _open_partial(partial)
    try:
        point("part.opened")
        fcntl.flock(directory_fd, fcntl.LOCK_SH)  # see NOTE [ The lock on a partial directory ] in commit.py
        committed = already_committed(spec)
        if committed is not None:
            files.remove(partial)  # empty, or the checkpoint that this save replaced
            return committed
        if not is_still(partial, directory_fd):
            vanished(partial)
        receipt = read_receipt(partial, spec.rank, part, spec.num_parts, spec.save_id)
        return receipt or _write_and_sign(task, layout, part, directory_fd)
    finally:
        os.close(directory_fd)


def _open_partial(partial: str) -> int:
    """Make it if it is not there (its parent has to be: a run's directory that was removed is not made again)."""
    with storage_errors("create", partial):
        for _ in range(_OPEN_ATTEMPTS):
            with suppress(FileExistsError):
                os.mkdir(partial)
            with suppress(FileNotFoundError):  # committed, or removed, between the two calls
                return files.open_directory(partial, follow=False)
    vanished(partial)


def _write_and_sign(task: WriteTask, layout: Layout, part: int, directory_fd: int) -> Receipt:
    spec, partial = task.spec, partial_path(task.spec)
    started = time.time()
    if part == 0:
        files.write_atomically(directory_fd, partial, record_name(spec.rank), to_record(task), spec.fsync)
    with ExitStack() as opened:
        writer = PartWriter(task, layout, directory_fd, partial, opened)
        segments = partition_once(layout, spec.num_parts, spec.whole_bytes)[part]
        whole = whole_files(layout, segments) if spec.whole_bytes else {}
        reused = reuse(spec, layout, whole, writer.hash, directory_fd)
        rest = reused.rest(layout, segments)
        writer.prepare(whole, reused.hashes)
        hashes = reused.all_hashes(segments, rest, writer.write(rest))
        written = time.time()
        point("part.written")
        if spec.fsync:
            writer.sync()
            sync_linked(layout, reused.linked, directory_fd, partial)
    if spec.fsync:  # the files' names, too, before a receipt says that they are there
        with storage_errors("sync", partial):
            os.fsync(directory_fd)
    synced = time.time()
    point("part.synced")
    receipt = Receipt(
        part=part,
        num_parts=spec.num_parts,
        save_id=spec.save_id,
        hashes=hashes,
        pid=os.getpid(),
        started=started,
        written=written,
        synced=synced,
        linked_bytes=reused.nbytes,
        generation=reused.generation,
        note=reused.note,
        rank=spec.rank,
    )
    receipt.write(directory_fd, partial, spec.fsync)
    point("part.receipt")
    return receipt
