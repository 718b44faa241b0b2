"""How a worker persists its part of a save.

    1. Open the partial directory; make it if needed. Take its flock shared: NOTE [ The lock on a partial directory ].
    2. Return at once if the save is committed, or if this part has a receipt: the task ran before, in a worker that died.
    3. Part 0 of each rank writes the save record. Without it, nobody could tell after a crash what is missing.
    4. Link unchanged files of an incremental save; hash and write everything else.
    5. Sync the data files, then the directory: the files' names must be durable, too, before a receipt vouches for them.
    6. Write the receipt under a temporary name, sync it, rename it. It exists only when all of the above is durable.
    7. Release the lock, then try to commit (``commit.py``). The last part to get here succeeds.

A worker may die at any step. Another one then runs the same task: it writes the same bytes to the same places.
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
from stager.workers.checkpoint.write.part_writer import PartWriter
from stager.workers.checkpoint.write.save_record import record_name, to_record
from stager.workers.checkpoint.write.unchanged_files import link_unchanged, sync_linked, whole_files
from stager.workers.checkpoint.write.write_task import WriteTask, read_layout
from stager.workers.faults import point
from stager.workers.gc_pause import no_collection
from stager.workers.memory.attached import detach_all_but

_OPEN_ATTEMPTS = 10
_DISCARD_SECS = 10.0
_POLL_SECS = 0.02


@dataclass(frozen=True, slots=True)
class PartResult:
    """What :func:`persist_part` returns: the receipt's times and note, and the commit if this part did it."""

    part: int
    pid: int
    started: float
    written: float
    synced: float
    committed: Committed | None
    note: str = ""


def persist_part(task: WriteTask, part: int) -> PartResult:
    """Write part ``part`` of ``task``; commit if it is the last part.

    Raises:
        StorageError: a system call failed. Nothing that looks like a checkpoint is left.
        CorruptCheckpointError: another program has written into the partial directory.
    """
    detach_all_but(task.live_slabs)
    with (
        storage_errors("save", partial_path(task.spec)),
        no_collection(),
    ):  # for errors to which no inner block has given a more precise message
        point("part.begin")
        layout = read_layout(task)
        done = _write_part(task, layout, part)
        if isinstance(done, Committed):
            return PartResult(part, os.getpid(), done.started, done.started, done.started, done)
        committed = try_commit(task.spec, layout)
    return PartResult(part, done.pid, done.started, done.written, done.synced, committed, done.note)


def prepare_worker() -> int:
    """Return the pid: the proof that this worker has started."""
    return os.getpid()


def discard_partial(directory: str, step: int, save_id: str, wait_secs: float = _DISCARD_SECS) -> None:
    """Remove the partial directory of a failed save, unless the save is committed after all.

    Runs in a worker, when no part of this rank runs any more. Another rank may still write, or be about to commit. So:

    1. Rename the directory. From then on nobody can commit it. If it was committed just before, there is nothing to do.
    2. Wait until nobody writes to it: until the lock is free, for at most ``wait_secs``.
    3. Remove it. If the wait takes too long, the other rank or the next run removes it.

    Raises:
        StorageError
    """
    partial = os.path.join(directory, partial_name(step, save_id))
    removed = os.path.join(directory, removing_name(step, save_id))
    with storage_errors("remove", partial):
        with suppress(FileNotFoundError):  # it is committed, or another rank was first
            removed = _rename_away(partial, removed)
        _remove_when_alone(removed, wait_secs)


def quarantine(directory: str, step: int, save_id: str) -> None:
    """Quarantine an incomplete save: rename it so that nobody commits it, and keep it for replicas to complete.

    Does nothing if the save is committed after all.

    Raises:
        StorageError
    """
    partial = os.path.join(directory, partial_name(step, save_id))
    kept = os.path.join(directory, unfinished_name(step, save_id))
    with storage_errors("rename", partial):
        try:
            os.rename(partial, kept)
        except FileNotFoundError:  # it is committed, or another rank was first
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            discard_partial(directory, step, save_id)  # a rank that began late has made the directory again


def discard_unfinished(directory: str, step: int, save_id: str) -> None:
    """Remove what :func:`quarantine` kept.

    Raises:
        StorageError
    """
    path = os.path.join(directory, unfinished_name(step, save_id))
    with storage_errors("remove", path):
        _remove_when_alone(path, _DISCARD_SECS)


def _rename_away(partial: str, removed: str) -> str:
    try:
        os.rename(partial, removed)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        removed += secrets.token_hex(4)  # a rank that began late has made the directory again
        os.rename(partial, removed)
    return removed


def _remove_when_alone(path: str, wait_secs: float) -> None:
    try:
        directory_fd = files.open_directory(path, follow=False)
    except FileNotFoundError:
        return
    except OSError:  # something that is not a directory
        files.remove(path)
        return
    try:
        if _lock_alone(directory_fd, wait_secs):
            files.remove(path)
    finally:
        os.close(directory_fd)


def _lock_alone(directory_fd: int, wait_secs: float) -> bool:
    deadline = time.monotonic() + wait_secs
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(_POLL_SECS)
    return False


def _write_part(task: WriteTask, layout: Layout, part: int) -> Receipt | Committed:
    """Do steps 1 to 6. Returns the receipt, or the commit if this task ran before and the save is committed."""
    spec, partial = task.spec, partial_path(task.spec)
    directory_fd = _open_partial(partial)
    try:
        point("part.opened")
        fcntl.flock(directory_fd, fcntl.LOCK_SH)  # see NOTE [ The lock on a partial directory ] in commit.py
        committed = already_committed(spec)
        if committed is not None:
            files.remove(partial)  # an empty directory, or the checkpoint that this save replaced
            return committed
        if not is_still(partial, directory_fd):
            vanished(partial)
        receipt = read_receipt(partial, spec.rank, part, spec.num_parts, spec.save_id)
        return receipt or _write_and_sign(task, layout, part, directory_fd)
    finally:
        os.close(directory_fd)


def _open_partial(partial: str) -> int:
    """Open the partial directory; make it if needed. The run's directory must exist: it is not made again here."""
    with storage_errors("create", partial):
        for _ in range(_OPEN_ATTEMPTS):
            with suppress(FileExistsError):
                os.mkdir(partial)
            with suppress(FileNotFoundError):  # it was committed, or removed, between the two calls
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
        unchanged = link_unchanged(spec, layout, whole, writer.hash, directory_fd)
        rest = unchanged.rest(layout, segments)
        writer.prepare(whole, unchanged.hashes)
        hashes = unchanged.all_hashes(segments, rest, writer.write(rest))
        written = time.time()
        point("part.written")
        if spec.fsync:
            writer.sync()
            sync_linked(layout, unchanged.linked, directory_fd, partial)
    if spec.fsync:  # step 5: names before the receipt
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
        linked_bytes=unchanged.nbytes,
        generation=unchanged.generation,
        note=unchanged.note,
        rank=spec.rank,
    )
    receipt.write(directory_fd, partial, spec.fsync)
    point("part.receipt")
    return receipt
