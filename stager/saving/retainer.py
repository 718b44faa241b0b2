"""Retention: which checkpoints stay. A worker prunes after each commit, one pruning at a time.

A commit during a pruning is followed by another pruning, so that the newest checkpoint always counts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

from stager.workers.checkpoint.directory.protected import change_protected_steps
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.directory.run_directory import path_of
from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport, prune
from stager.workers.checkpoint.maintenance.retention_rules import RetentionRules
from stager.workers.errors import ClosedError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")


class _Phase(Enum):
    """Whether a worker prunes now, and whether it must prune once more afterwards."""

    IDLE = auto()
    PRUNING = auto()
    PRUNING_AND_ONCE_MORE = auto()


@dataclass(eq=False)
class Retainer:
    """Removes the checkpoints that the rules do not keep.

    An error is logged, and the removal is tried again after the next commit: a committed save has not failed because an
    older checkpoint could not be removed.

    Attributes:
        directory: of the run, absolute.
        on_report: called with every report, in the pool's thread.
    """

    pool: WorkerPool
    directory: str
    rules: RetentionRules
    on_report: Callable[[PruneReport], None]
    _lacked_metric: bool = False
    _phase: _Phase = _Phase.IDLE
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Warn, once, if a save does not have the metric of ``keep_best``, or has NaN for it."""
        rule = self.rules.keep_best
        if rule is None or self._lacked_metric or not math.isnan(metrics.get(rule.metric, math.nan)):
            return
        self._lacked_metric = True
        logger.warning(
            "retention.keep_best goes by the metric %r, but this save has %s: it cannot be one of the best, and until a "
            "checkpoint has the metric, keep_best removes nothing; pass save(step, state, metrics={%r: ...}), or correct "
            "retention.keep_best.metric",
            rule.metric,
            ", ".join(f"{name} = {value:g}" for name, value in metrics.items()) or "no metrics",
            rule.metric,
        )

    def after_commit(self) -> None:
        """Have a worker prune; where one prunes already, once more after that. Returns at once."""
        if self.rules.keep_all:
            return
        with self._lock:
            is_idle = self._phase is _Phase.IDLE
            self._phase = _Phase.PRUNING if is_idle else _Phase.PRUNING_AND_ONCE_MORE
        if is_idle:  # the lock is released: if the task is done at once, _done() runs in this thread and takes it
            self._submit()

    def run(self, *, dry_run: bool) -> PruneReport:
        """Apply the rules now, and wait for it. With ``dry_run`` nothing is removed."""
        report = self.pool.submit(prune, self.directory, self.rules, dry_run=dry_run).result()
        if not dry_run:
            self.on_report(report)
        return report

    def _submit(self) -> None:
        try:
            future = self.pool.submit(prune, self.directory, self.rules)
        except ClosedError:  # the pool is closed: the next Checkpointer of this directory prunes
            with self._lock:
                self._phase = _Phase.IDLE
            return
        future.add_done_callback(self._done)

    def _done(self, future: Future[PruneReport]) -> None:
        error = future.exception()
        if error is None:
            self._log(future.result())
            self.on_report(future.result())
        elif not isinstance(error, ClosedError):
            logger.warning(
                "old checkpoints of %s were not removed; it is tried again after the next commit: %s",
                self.directory,
                error,
            )
        with self._lock:
            again = self._phase is _Phase.PRUNING_AND_ONCE_MORE
            self._phase = _Phase.PRUNING if again else _Phase.IDLE
        if again:
            self._submit()

    @staticmethod
    def _log(report: PruneReport) -> None:
        if removed := report.steps(PruneFate.REMOVED):
            logger.info("removed checkpoints of steps %s", ", ".join(map(str, removed)))
        for verdict in report.verdicts:
            if verdict.fate is PruneFate.LEFT:
                logger.warning("retention left the checkpoint of step %d: %s", verdict.step, verdict.reason)


def change_protected(directory: str, step: int, *, keep: bool) -> None:
    """Add a step to the run's list of protected steps, or remove it. Errors: :meth:`stager.Checkpointer.protect`."""
    with reading(path_of(directory, step)):  # so that it is not removed meanwhile
        change_protected_steps(directory, lambda steps: steps | {step} if keep else steps - {step})
