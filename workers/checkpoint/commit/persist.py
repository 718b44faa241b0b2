"""How a worker persists its part of a save, and how a failed save is removed or kept for replicas.

    1. Open the partial directory; make it if needed. Take its lock shared: NOTE [ The lock on a partial directory ].
    2. Return at once if the save is committed, or if this part has a receipt: the task ran before, in a worker that died.
    3. Part 0 of each rank writes the save record, and the sidecars.
    4. Link unchanged files of an incremental save; hash and write everything else. What is not in the slab yet is waited
       for: NOTE [ A slab that is half filled ] in ``workers/memory/fill_marks.py``.
    5. Sync the data files, then the directory.
    6. Write the receipt under a temporary name, sync it, rename it. Not before the snapshot is whole.
    7. Release the lock, then try to commit (``commit.py``). The last part to get here succeeds.

A worker may die at any step. Another one then runs the same task: it writes the same bytes to the same places.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass

from stager.workers.checkpoint.commit.commit import (
    Committed,
    already_committed,
    partial_path,
    read_receipt,
    try_commit,
)
from stager.workers.checkpoint.documents.names import partial_name, removing_name, unfinished_name
from stager.workers.checkpoint.documents.receipt import Receipt
from stager.workers.checkpoint.layout.layout import Layout, partition_once
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors, vanished
from stager.workers.checkpoint.storage.storage import Storage
from stager.workers.checkpoint.storage.unchanged import HardLinkBase, UnchangedFiles
from stager.workers.checkpoint.write.part_writer import PartWriter, runs_once, whole_files
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import WriteTask, read_extent, read_layout, record_name, to_record
from stager.workers.errors import AbandonedSnapshotError
from stager.workers.faults import point
from stager.workers.gc_pause import no_collection
from stager.workers.memory.attached import detach_all_but
from stager.workers.memory.fill_marks import FillWatch

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
        AbandonedSnapshotError: the snapshot will never be whole. The partial directory is removed if this is an orphan, and
            no other rank writes there.
        CorruptCheckpointError: another program has written into the partial directory.
    """
    detach_all_but(task.live_slabs)
    # For errors to which no inner block gives a more precise message.
    working = storage_of(task.spec.directory).working(task.spec.directory, task.spec.run)
    with storage_errors("save", partial_path(task.spec)), no_collection(), working:
        point("part.begin")
        layout = read_layout(task)
        try:
            done = _write_part(task, layout, part)
        except AbandonedSnapshotError as error:
            if error.is_orphan and task.spec.num_ranks == 1:  # otherwise the trainer, or another rank, does it
                discard_partial(task.spec.directory, task.spec.final_name, task.spec.save_id)
            raise
        if isinstance(done, Committed):
            return PartResult(part, os.getpid(), done.started, done.started, done.started, done)
        # 7. After the shared lock is released: with it, this part would refuse itself the exclusive one. Every part tries,
        #    because none knows whether it is the last.
        committed = try_commit(task.spec, layout)
    return PartResult(part, done.pid, done.started, done.written, done.synced, committed, done.note)


def prepare_worker() -> int:
    """Return the pid. A worker that answers has started, and has imported this module, which the first part needs."""
    return os.getpid()


def _write_part(task: WriteTask, layout: Layout, part: int) -> Receipt | Committed:
    """Do steps 1 to 6. Returns the receipt, or the commit if this task ran before and the save is committed."""
    spec, partial = task.spec, partial_path(task.spec)
    storage = storage_of(spec.directory)
    with storage.create(partial) as entry:
        point("part.opened")
        # 1. Held until the receipt is written, so that no commit begins meanwhile. Waits for a commit that is going on.
        entry.share_lock()
        # 2. Only with the lock: a commit that ended while this process waited has renamed the directory.
        committed = already_committed(spec)
        if committed is not None:
            storage.remove(partial)  # an empty directory, or the checkpoint that this save replaced
            return committed
        if not entry.is_still() or storage.exists(_withdrawn_path(spec)):
            vanished(partial)
        # A worker that died after its receipt has done everything but the commit.
        receipt = read_receipt(entry, spec.rank, part, spec.num_parts, spec.save_id)
        return receipt or _write_and_sign(task, layout, part, entry)


def _write_and_sign(task: WriteTask, layout: Layout, part: int, entry: Entry) -> Receipt:
    """Do steps 3 to 6."""
    spec = task.spec
    started = time.time()
    # 3. Before any data: without the record, nobody could tell after a crash what is missing.
    if part == 0:
        entry.put(record_name(spec.rank), to_record(task), sync=spec.fsync)
        _write_sidecars(task, entry)
    filled = FillWatch(task.slab, task.marks)
    writer = PartWriter(task, layout, filled, entry)
    segments = rest = partition_once(layout, spec.num_parts, spec.whole_bytes)[part]
    runs = runs_once(layout, part, spec.num_parts, spec.whole_bytes)
    # 4. Links first: what was linked must not be opened for writing, because other checkpoints share it.
    whole = whole_files(layout, segments) if spec.whole_bytes else {}
    unchanged = UnchangedFiles()
    if spec.base is not None and whole:
        base = HardLinkBase(spec.directory, spec.base, spec.full_every)
        unchanged = entry.link_unchanged(base, layout, whole, writer.hash)
    if unchanged.linked:
        files_of_items = layout.files_of_items()
        rest = [segment for segment in segments if files_of_items[segment.index] not in unchanged.linked]
        runs = [run for run in runs if run.file not in unchanged.linked]
    # 5. Synced before the receipt, which vouches for the data.
    hashes, written = writer.write(runs, whole, unchanged.hashes, sync=spec.fsync)
    if unchanged.linked:
        known = {**unchanged.hashes, **dict(zip(rest, hashes, strict=True))}
        hashes = [known[segment] for segment in segments]
    if spec.fsync:
        entry.sync_linked(unchanged.linked, layout)
        with storage_errors("sync", entry.path):
            entry.sync()  # the files' names must be durable, too
    synced = time.time()
    point("part.synced")
    # 6. Last: a receipt exists only when all of the above is durable, and the snapshot was found whole and not torn.
    filled.wait_until_whole()
    linked = unchanged.nbytes, unchanged.generation, unchanged.note
    receipt = Receipt(
        part, spec.num_parts, spec.save_id, tuple(hashes), os.getpid(), started, written, synced, *linked, spec.rank
    )
    entry.put(receipt.name, receipt.to_bytes(), sync=spec.fsync)
    point("part.receipt")
    return receipt


def _write_sidecars(task: WriteTask, entry: Entry) -> None:
    data = read_extent(task, task.sidecars)
    for file in task.spec.sidecars:
        entry.put(file.name, data[: file.nbytes], sync=task.spec.fsync)
        data = data[file.nbytes :]


# -- the end of a save that is deleted, or has failed ------------------------------------------------------------------


# NOTE [ Withdrawing a save ]
# Who deletes a save in flight makes the directory ``<name>.removing-<save_id>``, and then renames the partial directory onto
# it. A part makes the partial directory, and then looks for ``.removing-``. So whichever comes first, nobody writes into a
# directory that could be committed: parts that write find that the name is gone (before each write, and at the end), and
# parts that begin later find ``.removing-``. It stays until no part of this rank runs any more (``discard_partial``).
def withdraw(directory: str, name: str, save_id: str) -> None:
    """Take its name from the partial directory of a save in flight. From then on nobody can commit it.

    It may have been committed just before; then nothing happens.

    Raises:
        StorageError
    """
    partial = os.path.join(directory, partial_name(name, save_id))
    removed = os.path.join(directory, removing_name(name, save_id))
    storage = storage_of(directory)
    with storage_errors("remove", partial):
        storage.make(removed)
        point("withdraw.marked")
        with suppress(FileNotFoundError):
            storage.rename(partial, removed)
        storage.sync(directory)  # a power failure must not bring it back
        point("withdraw.synced")


def _withdrawn_path(spec: SaveSpec) -> str:
    return os.path.join(spec.directory, removing_name(spec.final_name, spec.save_id))


def discard_partial(directory: str, name: str, save_id: str, wait_secs: float = _DISCARD_SECS) -> None:
    """Remove the partial directory of a failed save, unless the save is committed after all.

    ``name`` is that of the checkpoint. Runs in a worker, when no part of this rank runs any more. Another rank may still
    write, or be about to commit.
    """
    partial = os.path.join(directory, partial_name(name, save_id))
    removed = os.path.join(directory, removing_name(name, save_id))
    storage = storage_of(directory)
    with storage_errors("remove", partial):
        # 1. Rename. From then on nobody can commit it. If it was committed just before, there is nothing to rename.
        with suppress(FileNotFoundError):  # it is committed, or withdrawn, or another rank was first
            if not storage.rename(partial, removed):  # a rank that began late has made the directory again
                removed += secrets.token_hex(4)
                storage.rename(partial, removed)
        # 2. Only then remove it: whoever still writes has it open, and finds later that the name is gone.
        _remove_when_alone(storage, removed, wait_secs)


def quarantine(directory: str, name: str, save_id: str) -> None:
    """Quarantine an incomplete save: rename it so that nobody commits it, and keep it for replicas to complete.

    Does nothing if the save is committed after all.
    """
    partial = os.path.join(directory, partial_name(name, save_id))
    # One rename decides between this and a commit: whichever comes first takes the name away from the other.
    with storage_errors("rename", partial), suppress(FileNotFoundError):  # it is committed, or another rank was first
        if not storage_of(directory).rename(partial, os.path.join(directory, unfinished_name(name, save_id))):
            discard_partial(directory, name, save_id)  # a rank that began late has made the directory again


def discard_unfinished(directory: str, name: str, save_id: str) -> None:
    """Remove what :func:`quarantine` kept."""
    path = os.path.join(directory, unfinished_name(name, save_id))
    with storage_errors("remove", path):
        _remove_when_alone(storage_of(directory), path, _DISCARD_SECS)


def _remove_when_alone(storage: Storage, path: str, wait_secs: float) -> None:
    """Remove a directory when nobody writes to it. If that takes too long, another rank or the next run removes it."""
    try:
        entry = storage.open(path)
    except FileNotFoundError:
        return
    except OSError:  # something that is not a directory
        storage.remove(path)
        return
    # A part holds the lock shared while it writes. So the exclusive lock proves that nobody writes any more, and nobody
    # will: the directory has lost the name under which parts look for it.
    deadline = time.monotonic() + wait_secs
    with entry:
        while time.monotonic() < deadline:
            if entry.try_lock():  # no part of another rank holds it
                storage.remove(path)
                return
            time.sleep(_POLL_SECS)
