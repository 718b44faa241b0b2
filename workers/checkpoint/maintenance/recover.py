"""Recover: finish or remove what earlier runs left when they crashed. A run does this before its first save.

For each ``<name>.partial-<id>``, with its lock held (the caller holds the run's lock, so no run writes to it):

    1. It has a manifest, or is ``.replaced``: the crash came between manifest and rename. Check the files, rename.
    2. It has save records and every receipt: only the commit is missing. Check the files, commit.
    3. Parts are missing: remove it. Or, if replicas may complete it (``leave_unfinished``), leave it.
    4. It is damaged, or older than the checkpoint of its name: remove it.

Before them, what was quarantined (``.unfinished-<id>``) is resumed for the replicas, or removed. After them, removals that a
crash interrupted (``.removing-<nonce>``) are finished. All steps can be repeated after another crash.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial as bind
from itertools import islice

from stager.workers.checkpoint.commit import commit
from stager.workers.checkpoint.commit.merge import merge
from stager.workers.checkpoint.commit.persist import discard_unfinished
from stager.workers.checkpoint.directory import run_directory
from stager.workers.checkpoint.directory.manifest_file import read_header
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest, ManifestHeader, parse_manifest
from stager.workers.checkpoint.documents.names import (
    REPLACED,
    is_partial,
    parse_checkpoint,
    parse_partial,
    partial_name,
    unfinished_name,
)
from stager.workers.checkpoint.documents.receipt import finished_ranks, receipt_name
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.read.verify import check_files
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import from_record, record_name, recorded_ranks
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, InconsistentRanksError, StorageError

_RENAME_MISSING = "its manifest was written, only the rename was missing"


class RecoverOutcome(Enum):
    """What became of a directory that a crash left."""

    COMMITTED = "committed"
    REMOVED = "removed"
    LEFT = "left as it is"


@dataclass(frozen=True, slots=True)
class RecoveredDirectory:
    """A directory that a crash left: its name, what became of it, and why."""

    name: str
    outcome: RecoverOutcome
    reason: str

    def __str__(self) -> str:
        begun = ""
        if self.outcome is RecoverOutcome.REMOVED and is_partial(self.name):
            name, _ = parse_partial(self.name)
            step = parse_checkpoint(name)
            begun = f"{name if step is None else f'step {step}'} was begun and is not whole: "
        return f"{begun}{self.name} left by an earlier run: {self.outcome.value} ({self.reason})"


class _UnfinishedError(CorruptCheckpointError):
    """Parts of the save are missing; nothing is known to be wrong with the parts that are there."""


def recover(directory: str, *, dry_run: bool = False, leave_unfinished: bool = False) -> list[RecoveredDirectory]:
    """Recover every directory that a crash left. One that raises a storage error is left as it is; it hinders nobody.

    Args:
        dry_run: change nothing; say what would be done.
        leave_unfinished: keep saves that replicas may complete (``replica.py``), and resume those in quarantine.

    Raises:
        StorageError: the directory cannot be listed.
    """
    found: list[RecoveredDirectory] = []

    def attempt(name: str, action: Callable[[], tuple[RecoverOutcome, str]]) -> None:
        try:
            found.append(RecoveredDirectory(name, *action()))
        except StorageError as error:
            found.append(RecoveredDirectory(name, RecoverOutcome.LEFT, str(error)))

    if not dry_run:
        with storage_errors("recover", directory):
            storage_of(directory).tidy(directory)
    # Before the partial directories are listed: a resumed save is one of them, and may be complete.
    for save in run_directory.unfinished_saves(directory):
        attempt(unfinished_name(*save), bind(_resume, directory, save, dry_run, leave_unfinished))
    # In the order of their names, ``.replaced`` comes after its replacement: renamed back only if that was not committed.
    for name in run_directory.partial_names(directory):
        attempt(name, bind(_recover_partial, directory, name, dry_run, leave_unfinished))
    for name in run_directory.withdrawn_names(directory):
        attempt(name, bind(_go_on_removing, os.path.join(directory, name), dry_run))
    return found


def _resume(directory: str, save: tuple[str, str], dry_run: bool, leave_unfinished: bool) -> tuple[RecoverOutcome, str]:
    """Resume a save from quarantine (``persist.quarantine``), or remove it."""
    if not leave_unfinished:
        if not dry_run:
            discard_unfinished(directory, *save)
        return RecoverOutcome.REMOVED, "its save failed because parts of other ranks did not arrive in time"
    path = os.path.join(directory, unfinished_name(*save))
    if not dry_run:
        with storage_errors("rename", path):
            storage_of(directory).rename(path, os.path.join(directory, partial_name(*save)))
    return RecoverOutcome.LEFT, "parts are missing; replicas may have them"


def _go_on_removing(path: str, dry_run: bool) -> tuple[RecoverOutcome, str]:
    reason = "its removal had begun, by retention or after its save failed"
    return RecoverOutcome.REMOVED, reason if dry_run else _remove(path, reason)


def _remove(path: str, reason: str) -> str:
    """Remove what is stager's in a directory. Returns the reason, and where strangers stay, if there are any."""
    with storage_errors("remove", path):
        left = storage_of(path).remove(path)
    return reason if left is None else f"{reason}; what is not stager's in it stays in {left}"


def _recover_partial(directory: str, name: str, dry_run: bool, leave_unfinished: bool) -> tuple[RecoverOutcome, str]:
    try:
        return RecoverOutcome.COMMITTED, _finish(directory, name, dry_run)
    except (CorruptCheckpointError, CheckpointNotFoundError, InconsistentRanksError) as error:
        # 3. Only a save that is not known to be damaged is worth completing.
        if leave_unfinished and isinstance(error, _UnfinishedError):
            return RecoverOutcome.LEFT, str(error)
        # 3 and 4. The lock is released by now. That is safe, because the caller holds the run's lock.
        path = os.path.join(directory, name)
        return RecoverOutcome.REMOVED, str(error) if dry_run else _remove(path, str(error))


def _finish(directory: str, name: str, dry_run: bool) -> str:
    """Commit a partial directory and return why that was right; raise if it cannot be committed."""
    final_name, save_id = parse_partial(name)
    path, final = os.path.join(directory, name), os.path.join(directory, final_name)
    with ExitStack() as stack:
        entry = _lock(path, stack)
        # 1. A manifest first. Once it is written, the commit removes receipts, so their number says nothing any more.
        data = entry.read(MANIFEST_NAME)
        manifest = None if data is None else parse_manifest(data, os.path.join(path, MANIFEST_NAME))
        if name.endswith(REPLACED) or (manifest is not None and manifest.header.save_id != save_id):
            return _finish_replacement(path, final, manifest, entry, dry_run)
        if manifest is not None:
            _check_place(path, final, manifest.header, save_id)
            # The manifest does not say whether the save synced its files. If not, a power failure may have spoiled them:
            # hash them before the rename, after which they would count as committed.
            _check_files(path, manifest, full=True)
            if not dry_run:
                commit.put_in_place(entry, final, manifest, fsync=True)
            return _RENAME_MISSING
        spec, layout = _read_record(directory, entry)
        # Before the receipts are read: an older save is removed, whether it is complete or not.
        _check_place(path, final, spec, save_id)
        manifest = _from_receipts(spec, layout, entry, dry_run)
        # 2. A receipt proves nothing after a power failure if the save did not sync its files: then check every hash.
        #    Otherwise sizes are enough. Again before the rename.
        _check_files(path, manifest, full=not spec.fsync)
        if not dry_run:
            threads = commit.num_threads(spec.num_ranks)
            commit.put_in_place(entry, final, manifest, spec.fsync, num_threads=threads)
    return "every part was written, only the commit was missing"


def _finish_replacement(path: str, final: str, manifest: Manifest | None, entry: Entry, dry_run: bool) -> str:
    """Put a replaced checkpoint back if its replacement was not committed; or commit one of ``StagerStorageWriter``.

    The partial directories of ``StagerStorageWriter`` do not have the save's id in their name, so their files are hashed.
    """
    storage = storage_of(final)
    if storage.exists(final):
        raise CorruptCheckpointError(path, f"cannot be resumed: {final} took its place")
    if manifest is None or manifest.header.final_name != os.path.basename(final):
        raise CorruptCheckpointError(path, f"has no manifest of {os.path.basename(final)}")
    if not path.endswith(REPLACED):
        _check_files(path, manifest, full=True)
        if not dry_run:
            commit.put_in_place(entry, final, manifest, fsync=True)
        return _RENAME_MISSING
    # Nothing is checked here: it was a committed checkpoint, and whoever reads it checks its hashes.
    if not dry_run:
        with storage_errors("commit", final):
            storage.put_back(path, final)
    return "its replacement was not committed"


def _lock(path: str, stack: ExitStack) -> Entry:
    """Open the partial directory and take its lock until ``stack`` ends. One that is in use is left as it is."""
    with storage_errors("open", path):
        try:
            entry = stack.enter_context(storage_of(path).open(path))
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise CorruptCheckpointError(path, "is not a directory") from error
            raise
        if not entry.try_lock():
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), path)
        return entry


def _read_record(directory: str, entry: Entry) -> tuple[SaveSpec, Layout]:
    """Read the save record of any rank: it says how many ranks and parts the save has."""
    name = record_name(min(recorded_ranks(entry.names()), default=0))
    data = entry.read(name)
    if data is None:
        raise _UnfinishedError(entry.path, "has no save record, so its save had hardly begun; it can be removed")
    return from_record(data, os.path.join(entry.path, name), directory)


def _check_place(path: str, final: str, found: SaveSpec | ManifestHeader, save_id: str) -> None:
    """Raise if ``path`` contains another save than its name says, or if a newer one is at ``final``: that one stays."""
    if (found.final_name, found.save_id) != (os.path.basename(final), save_id):
        inside = partial_name(found.final_name, found.save_id)
        raise CorruptCheckpointError(path, f"contains the save {inside}: the directory was renamed")
    try:
        there = read_header(final)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return
    if there.final_name == found.final_name and there.created >= found.created:
        raise CorruptCheckpointError(path, f"is older than {final}")


def _check_files(path: str, manifest: Manifest, *, full: bool) -> None:
    problems = check_files(path, manifest, full=full)
    if problems:
        raise CorruptCheckpointError(path, f"damaged: {problems[0]}")


def _from_receipts(spec: SaveSpec, layout: Layout, entry: Entry, dry_run: bool) -> Manifest:
    path = entry.path
    if dry_run:  # the same checks, without writing the index files
        contributions = commit.read_contributions(spec, layout, entry)
        manifest = contributions and commit.build_manifest(contributions, *merge(contributions, path), ())
    else:
        manifest = commit.manifest_of(spec, layout, entry)
    if manifest:
        return manifest
    names = entry.names()
    if spec.num_ranks == 1:
        missing = [part for part in range(spec.num_parts) if receipt_name(0, part, spec.num_parts) not in names]
        raise _UnfinishedError(path, f"was never finished: {len(missing)} of {spec.num_parts} parts are missing")
    there = finished_ranks(names)
    ranks = [str(rank) for rank in islice((rank for rank in range(spec.num_ranks) if rank not in there), 9)]
    whose = ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    raise _UnfinishedError(path, f"was never finished: parts of rank {whose} are missing")
