"""Retention: decide which checkpoints stay, and have ``removal.py`` remove the others.

    1. Finish removals that a crash interrupted.
    2. Judge by the rules, without reading any checkpoint: the newest ``keep_latest``, the steps that ``keep_every`` divides,
       and protected steps stay. Without rules all stay.
    3. If one is to be removed, judge again, now with verification. Only a checkpoint that passes quick verification counts
       as one of the newest, and the newest must pass full verification. So the last valid checkpoint is never removed.
    4. Remove those that no rule keeps.

Never touched: partial directories, damaged checkpoints that would count, checkpoints that are being read (``read_lock.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from stager.workers.checkpoint.commit.commit import has_manifest
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.protected import read_protected
from stager.workers.checkpoint.directory.run_directory import checkpoint_name, committed_steps, removing_names
from stager.workers.checkpoint.maintenance.removal import PruneFate, PruneVerdict, delete, exclusive_bytes, remove
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.faults import point

__all__ = ["PruneFate", "PruneReport", "PruneVerdict", "RetentionRules", "prune"]


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Which checkpoints to keep.

    Attributes:
        keep_latest: keep so many of the newest; None: no such rule.
        keep_every: keep the steps that it divides; None: no such rule. The newest stays as well.
        protected: keep these steps, in addition to those of :mod:`stager.workers.checkpoint.directory.protected`.
        full: hash the newest before any other is removed; otherwise check its names and sizes.
        num_threads: threads that hash; None: one per usable core, at most 8.
    """

    keep_latest: int | None = None
    keep_every: int | None = None
    protected: frozenset[int] = frozenset()
    full: bool = True
    num_threads: int | None = None

    @property
    def keep_all(self) -> bool:
        """Whether there is no rule, so that all stay."""
        return self.keep_latest is None and self.keep_every is None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        verdicts: one per checkpoint, newest first.
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
        for name in removing_names(directory):  # a crash interrupted their removal
            delete(os.path.join(directory, name))
    steps = committed_steps(directory)
    verdicts = _judge(directory, steps, rules, _trusted)
    if any(
        verdict.fate is PruneFate.REMOVED for verdict in verdicts.values()
    ):  # step 3; damage can only let more of them stay
        verdicts = _judge(directory, steps, rules, _verified)
    doomed = [step for step in steps if verdicts[step].fate is PruneFate.REMOVED]
    point("prune.verified")
    if dry_run or not doomed:
        freed_bytes = exclusive_bytes(verdicts[step].path for step in doomed)
    else:
        outcome, freed_bytes = remove(directory, [verdicts[step] for step in doomed])
        verdicts.update(outcome)
    return PruneReport(tuple(verdicts[step] for step in steps), freed_bytes, dry_run)


# -- who goes ---------------------------------------------------------------------------------------------------


_Check = Callable[[str, int, RetentionRules, bool], str | None]
"""(directory, step, rules, whether it is the newest that would count) -> the problem, or None."""


def _trusted(directory: str, step: int, rules: RetentionRules, first: bool) -> str | None:
    return None


def _verified(directory: str, step: int, rules: RetentionRules, first: bool) -> str | None:
    path = os.path.join(directory, checkpoint_name(step))
    result = verify_checkpoint(path, full=rules.full and first, num_threads=rules.num_threads)
    if not result.ok:
        return result.problems[0]
    return None if result.step == step else f"its manifest is of step {result.step}: the directory was renamed"


def _judge(directory: str, steps: list[int], rules: RetentionRules, check: _Check) -> dict[int, PruneVerdict]:
    """Return the verdict on each step. ``steps`` are newest first."""

    def verdict(step: int, fate: PruneFate, reason: str, *, damaged: bool = False) -> PruneVerdict:
        return PruneVerdict(step, os.path.join(directory, checkpoint_name(step)), fate, reason, damaged)

    if rules.keep_all:
        return {step: verdict(step, PruneFate.KEPT, "there is no rule: all are kept") for step in steps}
    verdicts: dict[int, PruneVerdict] = {}
    wanted = rules.keep_latest or 1
    latest, damaged = _newest_valid(directory, steps, wanted, rules, check)
    protected = rules.protected | read_protected(directory)
    youngest = _youngest(directory, steps, wanted)
    for step in steps:
        if step in protected:
            verdicts[step] = verdict(step, PruneFate.KEPT, "protected", damaged=step in damaged)
        elif step in latest:
            verdicts[step] = verdict(step, PruneFate.KEPT, f"one of the newest {wanted}")
        elif step in damaged:
            verdicts[step] = verdict(step, PruneFate.LEFT, f"damaged: {damaged[step]}", damaged=True)
        elif rules.keep_every is not None and step % rules.keep_every == 0:
            verdicts[step] = verdict(step, PruneFate.KEPT, f"a multiple of {rules.keep_every}")
        elif step in youngest:
            verdicts[step] = verdict(step, PruneFate.KEPT, f"one of the {wanted} that were committed last")
        elif not latest:
            verdicts[step] = verdict(step, PruneFate.LEFT, "no valid checkpoint would remain")
        elif os.path.islink(os.path.join(directory, checkpoint_name(step))):
            verdicts[step] = verdict(step, PruneFate.LEFT, "it is a symbolic link; remove the link yourself")
        elif not has_manifest(os.path.join(directory, checkpoint_name(step))):
            verdicts[step] = verdict(
                step, PruneFate.LEFT, "it has no manifest: it may not be a checkpoint", damaged=True
            )
        else:
            verdicts[step] = verdict(step, PruneFate.REMOVED, "no rule keeps it")
    return verdicts


def _newest_valid(
    directory: str, steps: list[int], wanted: int, rules: RetentionRules, check: _Check
) -> tuple[set[int], dict[int, str]]:
    """Return up to ``wanted`` valid steps, newest first; and the damaged ones among them, with their problems."""
    valid: set[int] = set()
    damaged: dict[int, str] = {}
    for step in steps:
        if len(valid) == wanted:
            break
        problem = check(directory, step, rules, not valid)
        if problem is None:
            valid.add(step)
        else:
            damaged[step] = problem
    return valid, damaged


def _youngest(directory: str, steps: list[int], count: int) -> set[int]:
    """Return the steps that were committed last.

    After a run went back to an earlier step, they are not the highest: by the step alone, the first save of the new branch
    would be removed at once.
    """
    times = []
    for step in steps:
        try:
            stat = os.lstat(os.path.join(directory, checkpoint_name(step), MANIFEST_NAME))
        except OSError:
            continue
        times.append((stat.st_mtime_ns, step))
    return {step for _, step in sorted(times, reverse=True)[:count]}
