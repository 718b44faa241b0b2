"""What a run does with the partial directories of runs before it: finish what can be finished, remove the rest.

The caller holds the run's lock, so nobody writes to them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from workers import files
from workers.commit import publish, try_commit
from workers.directory import parse_partial, partial_name, partial_names, read_checkpoint, remove_partial
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError
from workers.files import storage_errors
from workers.job import RECORD_NAME, SaveFacts, from_record
from workers.manifest import MANIFEST_NAME, Manifest, read_manifest
from workers.receipt import receipt_name


class Outcome(Enum):
    COMMITTED = "committed"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Recovered:
    """A partial directory that was found: its name, what became of it, and why."""

    name: str
    outcome: Outcome
    reason: str


def recover(directory: str) -> list[Recovered]:
    """Deal with every partial directory.

    Raises:
        StorageError: the file system refuses.
    """
    return [_recover_one(directory, name) for name in partial_names(directory)]


def _recover_one(directory: str, name: str) -> Recovered:
    try:
        reason = _finish(directory, name)
    except (CorruptCheckpointError, CheckpointNotFoundError) as error:
        remove_partial(directory, name)
        return Recovered(name, Outcome.REMOVED, str(error))
    with suppress(FileNotFoundError):  # the one it replaced, where names cannot be exchanged
        remove_partial(directory, name)
    return Recovered(name, Outcome.COMMITTED, reason)


def _finish(directory: str, name: str) -> str:
    """Commit a partial directory, or raise that it cannot be."""
    partial = os.path.join(directory, name)
    step, save_id = parse_partial(name)
    with storage_errors("open", partial):
        directory_fd = files.open_directory(partial)
    try:
        if files.read_if_exists(directory_fd, MANIFEST_NAME) is not None:
            manifest = read_manifest(partial)
            facts = _facts_of(directory, manifest)
            _check_place(directory, name, facts)
            publish(facts, manifest, directory_fd)
            return "its manifest was written, only the rename was missing"
        record = files.read_if_exists(directory_fd, RECORD_NAME)
    finally:
        os.close(directory_fd)
    if record is None:
        raise CorruptCheckpointError(partial, "never finished: it has no record of what was to be written")
    facts, layout = from_record(record, os.path.join(partial, RECORD_NAME), directory)
    if (facts.step, facts.save_id) != (step, save_id):
        raise CorruptCheckpointError(partial, f"holds the record of {partial_name(facts.step, facts.save_id)}")
    _check_place(directory, name, facts)
    if try_commit(facts, layout) is None:
        missing = [i for i in range(facts.num_parts) if not os.path.exists(os.path.join(partial, receipt_name(i)))]
        raise CorruptCheckpointError(partial, f"never finished: {len(missing)} of {facts.num_parts} parts are missing")
    return "every part was written, only the commit was missing"


def _facts_of(directory: str, manifest: Manifest) -> SaveFacts:
    header = manifest.header
    return SaveFacts(
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


def _check_place(directory: str, name: str, facts: SaveFacts) -> None:
    """A newer checkpoint of the same step stays."""
    try:
        info, _ = read_checkpoint(directory, facts.step)
    except (CheckpointNotFoundError, CorruptCheckpointError):
        return
    if info.created >= facts.created:
        raise CorruptCheckpointError(os.path.join(directory, name), f"older than the {info.path} that is there")
