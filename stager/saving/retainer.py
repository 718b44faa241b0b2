"""Retention after each commit: in a worker, one at a time, and again if there was a commit meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport, RetentionRules, prune
from stager.workers.errors import ClosedError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")


class Retainer:
    """Removes what the rules do not keep.

    What goes wrong is logged and tried again after the next commit: a save that is committed has not failed because an older
    one could not be removed.

    Args:
        pool: whose workers do it.
        directory: of the run, absolute.
        rules: what to keep.
        on_report: called with every report, in the pool's thread.
    """

    def __init__(
        self, pool: WorkerPool, directory: str, rules: RetentionRules, on_report: Callable[[PruneReport], None]
    ) -> None:
        self._pool = pool
        self._directory = directory
        self._rules = rules
        self._on_report = on_report
        self._lock = threading.Lock()
        self._running = False
        self._again = False

    def after_commit(self) -> None:
        if self._rules.keep_all:
            return
        with self._lock:
            self._again = self._running
            if self._running:
                return
            self._running = True
        self._submit()

    def run(self, *, dry_run: bool) -> PruneReport:
        """Now, and wait for it."""
        report = self._pool.submit(prune, self._directory, self._rules, dry_run=dry_run).result()
        self._on_report(report)
        return report

    def _submit(self) -> None:
        try:
            future = self._pool.submit(prune, self._directory, self._rules)
        except ClosedError:  # the next run does it
            with self._lock:
                self._running = False
            return
        future.add_done_callback(self._done)

    def _done(self, future: Future[PruneReport]) -> None:
        error = future.exception()
        if error is None:
            self._report(future.result())
        elif not isinstance(error, ClosedError):
            logger.warning("old checkpoints were not removed: %s", error)
        with self._lock:
            self._running = again = self._again
            self._again = False
        if again:
            self._submit()

    def _report(self, report: PruneReport) -> None:
        if removed := report.steps(PruneFate.REMOVED):
            logger.info("removed checkpoints of steps %s", ", ".join(map(str, removed)))
        for verdict in report.verdicts:
            if verdict.fate is PruneFate.LEFT:
                logger.warning("retention left the checkpoint of step %d: %s", verdict.step, verdict.reason)
        self._on_report(report)
