"""Operations on the checkpoints of a run that need no Checkpointer: verify, recover, prune.

The commands ``stager verify``, ``stager recover`` and ``stager prune`` print what these functions return.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from stager.config.calls import explained
from stager.loading.foreign_path import not_ours
from stager.saving.open_here import take_over
from stager.workers.checkpoint.directory.run_directory import read_checkpoint_at, require_run_directory
from stager.workers.checkpoint.documents.names import parse_checkpoint
from stager.workers.checkpoint.maintenance.recover import RecoveredDirectory, RecoverOutcome
from stager.workers.checkpoint.maintenance.recover import recover as recover_all
from stager.workers.checkpoint.maintenance.retention import PruneReport
from stager.workers.checkpoint.maintenance.retention import prune as prune_by_rules
from stager.workers.checkpoint.maintenance.retention_rules import KeepBest, RetentionRules
from stager.workers.checkpoint.read.verify import VerifyReport, verify_checkpoint
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class RecoverReport:
    """What :func:`recover` found in a run's directory: each unfinished or half-removed directory, and what became of it.

    With ``dry_run`` nothing was changed; the outcomes are what would have been done.
    """

    directory: str
    found: tuple[RecoveredDirectory, ...]
    dry_run: bool

    @property
    def ok(self) -> bool:
        """Whether every directory was committed or removed: none was left as it is."""
        return not any(item.outcome is RecoverOutcome.LEFT for item in self.found)


@explained('verify("runs/gpt/step-00000100")')
def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = True,
    strict: bool = False,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check that one checkpoint is what was committed. Problems are in the report; they are not raised.

    Args:
        path: the checkpoint's directory (``.../step-00000100``).
        full: hash every byte; otherwise check only the manifest's seal, and the files' names and sizes.
        strict: count a file that does not belong to the checkpoint (``report.strangers``) as a problem, too.
        num_threads: threads that hash; None: one per usable core, at most 8.
        progress: called with the number of bytes just checked, from several threads.
    """
    started = time.monotonic()
    path = place_path(path, "the path of the checkpoint")
    if (problem := not_ours(path)) is not None:
        return VerifyReport(path, False, (f"{path}: {problem}",), 0, 0, time.monotonic() - started)
    report = verify_checkpoint(path, full=full, strict=strict, num_threads=num_threads, progress=progress)
    step = parse_checkpoint(os.path.basename(report.path))
    if report.ok and step is not None:
        try:
            read_checkpoint_at(
                report.path, step
            )  # a whole checkpoint under another step's name was not committed there
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            return replace(report, ok=False, problems=(str(error),))
    return report


@explained('recover("runs/gpt")')
def recover(directory: str | os.PathLike[str], *, dry_run: bool = False) -> RecoverReport:
    """Commit the saves that a crash left complete, and remove the incomplete ones. A new run does so by itself.

    Args:
        directory: of the run.
        dry_run: change nothing; report what would be done.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        UsageError: ``directory`` is a checkpoint, not a run.
        DirectoryInUseError: a run is alive there, or workers of a killed run still write.
        StorageError: the directory cannot be read or locked.
    """
    directory = require_run_directory(directory)
    with ExitStack() as held:
        if dry_run:
            held.enter_context(
                storage_of(directory).unused(directory)
            )  # takes no lock: that would change the lock file
        else:
            take_over(
                directory,
                "recover() needs the run for itself: close that one with its close(), then call recover() again",
            )
            held.callback(storage_of(directory).lock(directory, 0).close)
        return RecoverReport(directory, tuple(recover_all(directory, dry_run=dry_run)), dry_run)


@explained('prune("runs/gpt", keep_latest=3)')
def prune(
    directory: str | os.PathLike[str],
    *,
    keep_latest: int | None = None,
    keep_every: int | None = None,
    keep_every_secs: float | None = None,
    keep_best: KeepBest | None = None,
    protect: Iterable[int] = (),
    full: bool = True,
    dry_run: bool = False,
) -> PruneReport:
    """Remove the checkpoints that no rule keeps. The newest valid one always stays. Safe beside a live run.

    Args:
        directory: of the run.
        keep_latest: keep so many of the newest valid checkpoints.
        keep_every: keep the steps that it divides.
        keep_every_secs: keep the oldest, and from there on the first of each so many seconds.
        keep_best: keep the best by a metric.
        protect: keep these steps, in addition to those that ``Checkpointer.protect()`` recorded.
        full: hash the newest checkpoint before any other is removed; otherwise check only names and sizes.
        dry_run: change nothing; report what would be removed.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        UsageError: ``directory`` is a checkpoint, not a run; or no rule is given, or one is not positive.
        CorruptCheckpointError: the list of protected steps is damaged; nothing was removed.
        StorageError: the directory cannot be read.
    """
    rules = RetentionRules(
        keep_latest,
        keep_every,
        frozenset(protect),
        full=full,
        keep_best=keep_best,
        keep_every_secs=keep_every_secs,
    )
    if rules.keep_all:
        raise UsageError(
            "without keep_latest, keep_every, keep_every_secs and keep_best all checkpoints are kept; give at least one"
        )
    for name, rule in (("keep_latest", keep_latest), ("keep_every", keep_every)):
        if rule is not None and rule < 1:
            raise UsageError(f"{name} is {rule}; it must be at least 1")
    if keep_every_secs is not None and not 0 < keep_every_secs < math.inf:
        raise UsageError(f"keep_every_secs is {keep_every_secs}; it must be a number of seconds above 0")
    if keep_best is not None and (keep_best.count < 1 or keep_best.mode not in ("min", "max")):
        raise UsageError(f"{keep_best}: count must be at least 1, and mode must be 'min' or 'max'")
    return prune_by_rules(require_run_directory(directory), rules, dry_run=dry_run)
