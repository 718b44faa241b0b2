"""Recover: finish or remove what earlier runs left when they crashed. A run does this before its first save.

For each ``step-N.partial-<id>``, with its lock held (the caller holds the run's lock, so no run writes to it):

    1. It has a manifest, or is ``.replaced``: the crash came between manifest and rename. Check the files, rename.
    2. It has save records and every receipt: only the commit is missing. Check sizes, or every hash if the save did not sync
       its files (a receipt then proves nothing after a power failure). Commit.
    3. Parts are missing: remove it. Or, if replicas may complete it (``leave_unfinished``), leave it.
    4. It is damaged, or older than the checkpoint of its step: remove it.

Then what was quarantined (``.unfinished-<id>``) is resumed for the replicas, or removed; and removals that a crash
interrupted (``.removing-<nonce>``) are finished. All steps can be repeated after another crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from stager.workers.checkpoint.commit.commit import (
    build_manifest,
    manifest_of,
    publish,
    put_in_place,
    read_contributions,
)
from stager.workers.checkpoint.commit.merge import merge
from stager.workers.checkpoint.commit.persist import discard_unfinished
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, Manifest, parse_manifest
from stager.workers.checkpoint.directory.receipt import finished_ranks, receipt_name
from stager.workers.checkpoint.directory.run_directory import (
    REPLACED,
    checkpoint_name,
    parse_partial,
    partial_name,
    partial_names,
    read_checkpoint,
    remove_partial,
    removing_names,
    unfinished_name,
    unfinished_saves,
)
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.read.verify import check_files
from stager.workers.checkpoint.write.save_record import from_record, record_name, recorded_ranks
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, InconsistentRanksError, StorageError


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
    unfinished = unfinished_saves(directory)
    return [
        *(_resume(directory, save, dry_run, leave_unfinished) for save in unfinished),
        *(_recover_one(directory, name, dry_run, leave_unfinished) for name in partial_names(directory)),
        *(_go_on_removing(directory, name, dry_run) for name in removing_names(directory)),
    ]


def _recover_one(directory: str, name: str, dry_run: bool, leave_unfinished: bool) -> RecoveredDirectory:
    try:
        try:
            return RecoveredDirectory(name, RecoverOutcome.COMMITTED, _finish(directory, name, dry_run))
        except (CorruptCheckpointError, CheckpointNotFoundError, InconsistentRanksError) as error:
            if leave_unfinished and isinstance(error, _UnfinishedError):
                return RecoveredDirectory(name, RecoverOutcome.LEFT, str(error))
            if not dry_run:
                remove_partial(directory, name)
            return RecoveredDirectory(name, RecoverOutcome.REMOVED, str(error))
    except StorageError as error:
        return RecoveredDirectory(name, RecoverOutcome.LEFT, str(error))


def _resume(directory: str, save: tuple[int, str], dry_run: bool, leave_unfinished: bool) -> RecoveredDirectory:
    """Resume a save from quarantine (``persist.quarantine``), or remove it."""
    name, path = unfinished_name(*save), os.path.join(directory, unfinished_name(*save))
    try:
        if not leave_unfinished:
            if not dry_run:
                discard_unfinished(directory, *save)
            return RecoveredDirectory(
                name, RecoverOutcome.REMOVED, "its save failed because parts of other ranks did not arrive in time"
            )
        if not dry_run:
            with storage_errors("rename", path):
                os.rename(path, os.path.join(directory, partial_name(*save)))
    except StorageError as error:
        return RecoveredDirectory(name, RecoverOutcome.LEFT, str(error))
    return RecoveredDirectory(name, RecoverOutcome.LEFT, "parts are missing; replicas may have them")


def _go_on_removing(directory: str, name: str, dry_run: bool) -> RecoveredDirectory:
    """See NOTE [ How a checkpoint is removed ] in ``removal.py``."""
    path = os.path.join(directory, name)
    try:
        if not dry_run:
            with storage_errors("remove", path):
                files.remove(path)
    except StorageError as error:
        return RecoveredDirectory(name, RecoverOutcome.LEFT, str(error))
    return RecoveredDirectory(
        name, RecoverOutcome.REMOVED, "its removal had begun, by retention or after its save failed"
    )


def _finish(directory: str, name: str, dry_run: bool) -> str:
    """Commit a partial directory and return why that was right; raise if it cannot be committed."""
    partial = os.path.join(directory, name)
    step, save_id = parse_partial(name)
    with _locked(partial) as directory_fd:
        manifest = _read_manifest(partial)
        if name.endswith(REPLACED) or (manifest is not None and manifest.header.save_id != save_id):
            return _finish_replacement(directory, partial, step, manifest, directory_fd, dry_run)
        if manifest is not None:
            spec, full = (
                _spec_of(directory, manifest),
                True,
            )  # a manifest does not say whether the files were synced: hash them
            reason = "its manifest was written, only the rename was missing"
        else:
            spec, layout = _read_record(directory, partial)
            full = not spec.fsync
            reason = "every part was written, only the commit was missing"
        if (spec.step, spec.save_id) != (step, save_id):
            raise CorruptCheckpointError(
                partial, f"contains the save {partial_name(spec.step, spec.save_id)}: the directory was renamed"
            )
        _check_place(directory, partial, spec)
        manifest = manifest or _from_receipts(partial, spec, layout, directory_fd, dry_run)
        # See 2 above; files may also have been damaged since.
        problems = check_files(partial, manifest, full=full)
        if problems:
            raise CorruptCheckpointError(partial, f"damaged: {problems[0]}")
        if not dry_run:
            publish(spec, manifest, directory_fd)
    return reason


@contextmanager
def _locked(partial: str) -> Iterator[int]:
    """Open the directory and take its lock."""
    with storage_errors("open", partial):
        try:
            directory_fd = files.open_directory(partial, follow=False)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise CorruptCheckpointError(partial, "is not a directory") from error
            raise
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is in use, and left as it is
            yield directory_fd
        finally:
            os.close(directory_fd)


def _read_record(directory: str, partial: str) -> tuple[SaveSpec, Layout]:
    """Read the save record of any rank: it says how many ranks and parts the save has."""
    ranks = recorded_ranks(os.listdir(partial))
    path = os.path.join(partial, record_name(ranks[0] if ranks else 0))
    data = files.read_if_exists(path)
    if data is None:
        raise _UnfinishedError(partial, "was never finished, because it has no save record; it can be removed")
    return from_record(data, path, directory)


def _read_manifest(partial: str) -> Manifest | None:
    path = os.path.join(partial, MANIFEST_NAME)
    data = files.read_if_exists(path)
    return None if data is None else parse_manifest(data, path)


def _from_receipts(partial: str, spec: SaveSpec, layout: Layout, directory_fd: int, dry_run: bool) -> Manifest:
    if dry_run:  # the same checks, without writing the index files
        contributions = read_contributions(spec, layout, os.listdir(directory_fd))
        manifest = None if contributions is None else build_manifest(contributions, *merge(contributions, partial), ())
    else:
        manifest = manifest_of(spec, layout, directory_fd)
    if manifest is None:
        names = os.listdir(directory_fd)
        if spec.num_ranks > 1:
            there = finished_ranks(names)
            missing = list(islice((rank for rank in range(spec.num_ranks) if rank not in there), 9))
            whose = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise _UnfinishedError(partial, f"was never finished: parts of rank {whose} are missing")
        parts = [i for i in range(spec.num_parts) if receipt_name(0, i, spec.num_parts) not in names]
        raise _UnfinishedError(partial, f"was never finished: {len(parts)} of {spec.num_parts} parts are missing")
    return manifest


def _finish_replacement(
    directory: str, partial: str, step: int, manifest: Manifest | None, directory_fd: int, dry_run: bool
) -> str:
    """Put a replaced checkpoint back if its replacement was not committed; or commit one of ``StagerStorageWriter``.

    The partial directories of ``StagerStorageWriter`` do not have the save's id in their name, so their files are hashed.
    """
    final = os.path.join(directory, checkpoint_name(step))
    if os.path.lexists(final):
        raise CorruptCheckpointError(partial, f"cannot be resumed: {final} took its place")
    if manifest is None or manifest.header.step != step:
        raise CorruptCheckpointError(partial, "has no manifest of its step")
    if not partial.endswith(REPLACED):
        problems = check_files(partial, manifest, full=True)
        if problems:
            raise CorruptCheckpointError(partial, f"damaged: {problems[0]}")
        if not dry_run:
            put_in_place(partial, final, manifest, directory_fd, fsync=True)
        return "its manifest was written, only the rename was missing"
    if not dry_run:
        with storage_errors("commit", final):
            os.rename(partial, final)
            files.sync_directory(directory)
    return "its replacement was not committed"


def _spec_of(directory: str, manifest: Manifest) -> SaveSpec:
    header = manifest.header
    return SaveSpec(
        directory=directory,
        step=header.step,
        save_id=header.save_id,
        kind=header.kind,
        num_parts=0,
        fsync=True,
        created=header.created,
        stager=header.stager,
        torch=header.torch,
    )


def _check_place(directory: str, partial: str, spec: SaveSpec) -> None:
    """Raise if the step has a newer checkpoint: that one stays."""
    try:
        info, _ = read_checkpoint(directory, spec.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return
    if info.created >= spec.created:
        raise CorruptCheckpointError(partial, f"is older than {info.path}")
