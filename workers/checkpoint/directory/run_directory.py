"""The directory of a run: its names, and which checkpoints are committed.

<run>/<name>/                             a committed checkpoint; ``names.py`` has the names, and what else there is
<run>/.stager.lock                        held by the trainer and its workers (``posix/run_lock.py``)
<run>/.stager.protected                   steps that retention keeps (``protected.py``)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from stager.workers.checkpoint.directory.manifest_file import has_manifest, has_own_manifest, read_manifest
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest
from stager.workers.checkpoint.documents.names import (
    checkpoint_name,
    is_partial,
    is_removing,
    may_be_checkpoint,
    number_in,
    parse_checkpoint,
    parse_unfinished,
)
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError


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


def checkpoint_names(directory: str) -> dict[int, str]:
    """Return the name of each step's checkpoint, newest step first.

    Default names are only read. Of directories with other names, the first bytes of the manifest are read: one counts if its
    manifest has its name. Renamed ones and copies do not count. Of two checkpoints of one step, the later one counts.
    """
    found: dict[int, str] = {}
    storage = storage_of(directory)
    for name in _listed(directory, storage.checkpoint_names):
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
    path, storage = os.path.join(directory, name), storage_of(directory)
    head = storage.head(path)
    if head is not None:
        return head.step if head.name == name else None
    # A manifest that is damaged or lost must not make a checkpoint vanish: whoever reads it reports that.
    number = number_in(name)
    return number if number is not None and storage.file_of_ours(path) is not None else None


def _created(directory: str, name: str) -> float:
    head = storage_of(directory).head(os.path.join(directory, name))
    return -math.inf if head is None else head.created


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
    """Return about how many bytes the newest checkpoint has; 0: there is none, or nobody knows. Reads no manifest."""
    for name in islice(checkpoint_names(directory).values(), 1):
        with suppress(OSError):
            return storage_of(directory).nbytes(os.path.join(directory, name))
    return 0


def removing_names(directory: str) -> list[str]:
    """Return the names of the directories whose removal has begun, by retention or by ``delete()``."""
    return sorted(_listed(directory, storage_of(directory).removing_names))


def withdrawn_names(directory: str) -> list[str]:
    """Return :func:`removing_names`, and the names of saves that were withdrawn before they were committed."""
    return sorted({*removing_names(directory), *filter(is_removing, _names(directory))})


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
    return named and not (storage_of(path).has_directory(path) and bool(checkpoint_names(path)))


def require_run_directory(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a run's directory.

    Raises:
        CheckpointNotFoundError: ``path`` is not a directory.
        UsageError: ``path`` is one checkpoint, or is no path.
    """
    path = place_path(path)
    storage = storage_of(path)
    if not storage.has_directory(path):
        reason = "is not a directory" if storage.exists(path) else "no such directory"
        raise CheckpointNotFoundError(None, reason, path)
    if is_checkpoint_directory(path):
        raise UsageError(f"{path} is one checkpoint; name the run's directory")
    return path


def partial_names(directory: str) -> list[str]:
    """Return the names of partial directories; ``REPLACED`` checkpoints come after their replacements."""
    return sorted(filter(is_partial, _names(directory)))


def _names(directory: str) -> list[str]:
    return _listed(directory, storage_of(directory).names)


def _listed(directory: str, names: Callable[[str], list[str]]) -> list[str]:
    with storage_errors("list", directory):
        try:
            return names(directory)
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
        kept = storage_of(path).file_of_ours(path)
        if kept is None or has_manifest(path):  # committed between the two looks
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
    directory = place_path(directory)
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
