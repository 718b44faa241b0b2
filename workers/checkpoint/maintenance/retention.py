"""Retention: decide which checkpoints stay, and remove the others.

    1. Finish removals that a crash interrupted.
    2. Judge by the rules, without reading any checkpoint: the newest ``keep_latest``, the steps that ``keep_every`` divides,
       and protected steps stay. Without rules all stay, and ``keep_best`` is no rule before a checkpoint has its metric.
       Only ``keep_best`` and ``keep_every_secs`` read manifests: a process reads each once.
    3. If one is to be removed, judge again, now with verification. Only a checkpoint that passes quick verification counts
       as one of the newest or best, and the newest must pass full verification. So the last valid one is never removed.
    4. Remove those that no rule keeps.

Never touched: partial directories, damaged checkpoints that would count, checkpoints that are being read (``read_lock.py``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import Enum

from stager.workers.checkpoint.directory.manifest_file import has_manifest
from stager.workers.checkpoint.directory.protected import read_protected
from stager.workers.checkpoint.directory.run_directory import checkpoint_names, path_of, removing_names
from stager.workers.checkpoint.documents.names import removing_name
from stager.workers.checkpoint.maintenance.retention_rules import RetentionRules, best_steps, spaced_steps
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CheckpointNotFoundError, StorageError, UsageError
from stager.workers.faults import point


class PruneFate(Enum):
    """What became of a checkpoint."""

    KEPT = "kept"
    REMOVED = "removed"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class PruneVerdict:
    """What became of one checkpoint, or would become of it in a dry run.

    Attributes:
        fate: KEPT by the rules; REMOVED; or LEFT: no rule keeps it, but it could not be removed, or it is damaged.
    """

    step: int
    path: str
    fate: PruneFate
    reason: str
    damaged: bool = False

    @property
    def name(self) -> str:
        """Of the checkpoint's directory."""
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        verdicts: newest first.
        freed_bytes: bytes of removed files that no other checkpoint shares.
        dry_run: nothing was changed; REMOVED means "would be removed".
    """

    verdicts: tuple[PruneVerdict, ...]
    freed_bytes: int
    dry_run: bool

    def steps(self, fate: PruneFate) -> list[int]:
        """Return the steps that had this fate, newest first."""
        return [verdict.step for verdict in self.verdicts if verdict.fate is fate]

    @property
    def damaged(self) -> list[int]:
        """The steps whose checkpoints were found to be damaged."""
        return [verdict.step for verdict in self.verdicts if verdict.damaged]


def prune(directory: str, rules: RetentionRules, *, dry_run: bool = False) -> PruneReport:
    """Apply ``rules`` to the checkpoints of a run. Safe beside a live run, and safe to repeat after a crash.

    Raises:
        StorageError: the directory cannot be read.
        CorruptCheckpointError: the list of protected steps is damaged; nothing was removed.
    """
    point("prune.begin")
    if not dry_run:
        # 1. First: the disk may be full.
        for name in removing_names(directory):
            path = os.path.join(directory, name)
            with storage_errors("remove", path):
                storage_of(path).remove(path)
    paths = {step: os.path.join(directory, name) for step, name in checkpoint_names(directory).items()}
    # 2. Names only: a run prunes after each commit, and mostly nothing has to go.
    verdicts = _judge(directory, paths, rules, verified=False)
    # 3. Only if needed, because it reads. Damage that it finds can only let more of them stay.
    if any(verdict.fate is PruneFate.REMOVED for verdict in verdicts.values()):
        verdicts = _judge(directory, paths, rules, verified=True)
    doomed = [verdict for verdict in verdicts.values() if verdict.fate is PruneFate.REMOVED]
    point("prune.verified")
    if dry_run or not doomed:
        freed_bytes = storage_of(directory).exclusive_bytes(verdict.path for verdict in doomed)
    else:
        freed_bytes = _remove(directory, doomed, verdicts)
    return PruneReport(tuple(verdicts[step] for step in paths), freed_bytes, dry_run)


def remove(directory: str, step: int, name: str | None = None) -> PruneReport:
    """Remove one checkpoint, whatever the rules say. Returns its verdict: REMOVED, or LEFT and why.

    Args:
        name: of its directory; None: that of the step's checkpoint.

    Raises:
        CheckpointNotFoundError: there is none.
        UsageError: it is protected.
        StorageError
    """
    point("remove.begin")
    path = path_of(directory, step) if name is None else os.path.join(directory, name)
    refuse_protected(directory, step)
    storage = storage_of(path)
    if not storage.exists(path):
        if (freed := _go_on(directory, os.path.basename(path))) is not None:
            verdict = PruneVerdict(step, path, PruneFate.REMOVED, "delete() was called")
            return PruneReport((verdict,), freed, False)
        raise CheckpointNotFoundError(None, f"there is no checkpoint of step {step}, so none was removed", path)
    verdict = PruneVerdict(step, path, PruneFate.REMOVED, "delete() was called")
    reason = storage.why_not_removable(path)
    if reason is None and not has_manifest(path):
        reason = "it has no manifest: it may not be a checkpoint; remove it yourself"
    if reason is not None:
        return PruneReport((replace(verdict, fate=PruneFate.LEFT, reason=reason),), 0, False)
    verdicts = {step: verdict}
    freed_bytes = _remove(directory, [verdict], verdicts)
    return PruneReport(tuple(verdicts.values()), freed_bytes, False)


def _go_on(directory: str, name: str) -> int | None:
    """Go on with a removal that a worker began before it died. Returns the bytes freed; None: there is none."""
    begun = [
        os.path.join(directory, one) for one in removing_names(directory) if one.startswith(removing_name(name, ""))
    ]
    storage = storage_of(directory)
    freed = storage.exclusive_bytes(begun)
    for path in begun:
        with storage_errors("remove", path):
            storage.remove(path)
    return freed if begun else None


def refuse_protected(directory: str, step: int) -> None:
    """Raise a UsageError if the checkpoint of a step is protected. Raises also what :func:`read_protected` does."""
    if step in read_protected(directory):
        raise UsageError(f"the checkpoint of step {step} is protected; call unprotect({step}) first")


# -- who goes ---------------------------------------------------------------------------------------------------


def _judge(directory: str, paths: dict[int, str], rules: RetentionRules, *, verified: bool) -> dict[int, PruneVerdict]:
    """Return the verdict on each step: the rules keep it (KEPT), or it goes (REMOVED), or it would go but must not (LEFT).

    "Newest" is by the step's number. A checkpoint that was committed last may have a lower number, after the run went back
    to an earlier step; it stays, too.

    Args:
        paths: of the checkpoints by their steps, newest first.
        verified: whether to verify those that count as newest; otherwise all pass for valid, and nothing is read.
    """
    reason = "there is no rule: all are kept"
    best, worse = best_steps(paths, rules.keep_best, lambda step: _quick_problem(step, paths[step], rules, verified))
    if rules.keep_best is not None and not best:
        # A wrong name must not remove a run: until a checkpoint has the metric, the other rules decide alone.
        reason = f"no valid checkpoint has the metric {rules.keep_best.metric}, so keep_best removes none"
        rules = replace(rules, keep_best=None)
    if rules.keep_all:
        return {
            step: PruneVerdict(step, path, PruneFate.LEFT, f"damaged: {worse[step]}", damaged=True)
            if step in worse
            else PruneVerdict(step, path, PruneFate.KEPT, reason)
            for step, path in paths.items()
        }
    wanted = rules.keep_latest or 1
    latest, damaged = _newest_valid(paths, wanted, rules, verified)
    spaced, unread = spaced_steps(paths, rules.keep_every_secs)
    damaged |= worse | unread
    protected = rules.protected | read_protected(directory)
    committed_last = _committed_last(paths, wanted)

    every = {step for step in paths if rules.keep_every is not None and step % rules.keep_every == 0}
    first = {
        **best,
        **dict.fromkeys(latest, f"one of the newest {wanted}"),
        **dict.fromkeys(protected, "protected"),
    }
    second = {
        **dict.fromkeys(committed_last, f"one of the {wanted} that were committed last"),
        **dict.fromkeys(spaced, f"the first in {rules.keep_every_secs or 0:g} s"),
        **dict.fromkeys(every, f"a multiple of {rules.keep_every}"),
    }
    verdicts: dict[int, PruneVerdict] = {}
    for step, path in paths.items():
        fate = PruneFate.KEPT
        # In this order. "damaged" comes before ``keep_every``, so that a damaged checkpoint is reported as such.
        if step in first:
            reason = first[step]
        elif step in damaged:
            fate, reason = PruneFate.LEFT, f"damaged: {damaged[step]}"
        elif step in second:
            reason = second[step]
        elif not latest:
            fate, reason = PruneFate.LEFT, "no valid checkpoint would remain"
        elif (why := storage_of(path).why_not_removable(path)) is not None:
            fate, reason = PruneFate.LEFT, why
        elif not has_manifest(path):
            fate, reason = PruneFate.LEFT, "it has no manifest: it may not be a checkpoint"
            damaged[step] = reason
        else:
            fate, reason = PruneFate.REMOVED, "no rule keeps it"
        verdicts[step] = PruneVerdict(step, path, fate, reason, step in damaged)
    return verdicts


def _newest_valid(
    paths: dict[int, str], wanted: int, rules: RetentionRules, verified: bool
) -> tuple[set[int], dict[int, str]]:
    """Return up to ``wanted`` valid steps, newest first; and the damaged ones among them, with their problems.

    Unless they are ``verified``, each counts as valid.
    """
    valid: set[int] = set()
    damaged: dict[int, str] = {}
    for step, path in paths.items():
        if len(valid) == wanted:
            break
        problem = _problem(step, path, rules.full and not valid, rules.num_threads) if verified else None
        if problem is None:
            valid.add(step)
        else:
            damaged[step] = problem
    return valid, damaged


def _quick_problem(step: int, path: str, rules: RetentionRules, verified: bool) -> str | None:
    return _problem(step, path, False, rules.num_threads) if verified else None


def _problem(step: int, path: str, full: bool, num_threads: int | None) -> str | None:
    result = verify_checkpoint(path, full=full, num_threads=num_threads)
    if not result.ok:
        return result.problems[0]
    return None if result.step == step else f"its manifest is of step {result.step}: the directory was renamed"


def _committed_last(paths: dict[int, str], count: int) -> set[int]:
    """Return the ``count`` steps that were committed last, by the time of their manifests.

    After a run went back to an earlier step, they are not the highest: by the step alone, the first save of the new branch
    would be removed at once.
    """
    times, unknown = [], set()
    for step, path in paths.items():
        try:
            times.append((storage_of(path).committed_at(path), step))
        except (FileNotFoundError, NotADirectoryError):
            pass  # removed just now
        except OSError:
            unknown.add(step)  # it may be one of them
    return unknown | {step for _, step in sorted(times, reverse=True)[:count]}


# -- how it goes ------------------------------------------------------------------------------------------------


# NOTE [ How a checkpoint is removed ]
#     1. Take its directory's lock exclusively, without waiting. Refused: somebody reads it, so it stays.
#     2. Rename step-N to step-N.removing-<nonce>, and release the lock.
#     3. When all are renamed, sync the parent directory.
#     4. Unlink its own files, then the directory. What somebody else has put there stays (own_files.py).
# A crash before 2 changes nothing. After it, the name is not a checkpoint's, and the next prune or recover goes on with 4.
# Files that other checkpoints share (incremental saves) only lose a name. Two processes may prune at once: the second one
# finds that a name is gone.


def _remove(directory: str, doomed: list[PruneVerdict], verdicts: dict[int, PruneVerdict]) -> int:
    """Remove checkpoints; put the final verdicts into ``verdicts``. Returns the bytes freed."""
    renamed: dict[str, PruneVerdict] = {}
    storage = storage_of(directory)
    for verdict in doomed:
        verdicts[verdict.step], aside = _take_name(directory, verdict)
        if verdicts[verdict.step] is verdict:
            renamed[aside] = verdict
    if renamed:
        # 3. Before any file is unlinked: otherwise a power failure could bring back names without files.
        with storage_errors("sync", directory):
            storage.sync(directory)
    point("prune.renamed")
    freed_bytes = storage.exclusive_bytes(renamed)
    for aside, verdict in renamed.items():
        try:
            with storage_errors("remove", aside):
                left = storage.remove(aside)  # 4.
        except StorageError as error:
            reason = f"it was renamed, but not all its files could be removed: {error}"
            verdicts[verdict.step] = replace(verdict, fate=PruneFate.LEFT, reason=reason)
        else:
            if left is not None:
                reason = f"{verdict.reason}; what is not stager's in it stays in {left}"
                verdicts[verdict.step] = replace(verdict, reason=reason)
    point("prune.removed")
    return freed_bytes


def _take_name(directory: str, verdict: PruneVerdict) -> tuple[PruneVerdict, str]:
    """Do steps 1 and 2.

    Returns:
        ``verdict``, or another one if the checkpoint was not renamed; and the path that it has now.
    """
    path, storage = verdict.path, storage_of(directory)
    try:
        with storage_errors("remove", path), storage.open(path) as entry:
            # 1. With the lock, look again. A commit may have put another checkpoint here before it was taken.
            if not entry.try_lock() or not entry.is_still():
                reason = "it is being read" if entry.is_still() else "it was replaced just now"
                return replace(verdict, fate=PruneFate.LEFT, reason=reason), path
            # Protecting a step holds the lock, too: from here on nobody can protect it.
            if verdict.step in read_protected(directory):
                return replace(verdict, fate=PruneFate.KEPT, reason="protected"), path
            aside = storage.removing_path(path)
            is_renamed = storage.rename(path, aside)
            # 2. A commit that replaces it waits for this lock, but only for seconds. This process may have been stopped
            #    for longer, and then has renamed the new checkpoint. So give the name back.
            if not is_renamed or not entry.is_at(aside):
                if is_renamed:
                    storage.put_back(aside, path)
                return replace(verdict, fate=PruneFate.LEFT, reason="it was replaced just now"), path
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return replace(verdict, reason="somebody else removed it"), path
        return replace(verdict, fate=PruneFate.LEFT, reason=str(error)), path
    return verdict, aside
