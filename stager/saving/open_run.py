"""An open run: what a Checkpointer has while it may save. It is opened in this order, and closed from the last to the first.

    the directory's lock -> the files that listen -> arena -> workers -> replication -> saver

A Checkpointer with ``read_only=True`` has none. An open run holds no reference to its Checkpointer, so that one that nobody
holds any more can be told apart (``open_here.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from stager.config import StagerConfig
from stager.ranks.opening import take_directory
from stager.ranks.rank_group import RankGroup
from stager.replication.replication import Replication
from stager.saving import open_here, setup
from stager.saving.ending import Ending
from stager.saving.preemption import Preemption
from stager.saving.retainer import Retainer
from stager.saving.save import Save
from stager.saving.save_errors import SaveErrors
from stager.saving.saver import Saver
from stager.telemetry.event import PrunedEvent
from stager.telemetry.listeners import Listeners
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport
from stager.workers.errors import CheckpointNotFoundError, StorageError, UsageError

logger = logging.getLogger("stager")

_NOT_PREEMPTED = Preemption()  # until expect_preemption() is called


class OpenRun:
    """A run's directory, locked, and everything that saves into it.

    Args:
        directory: of the run, absolute.
        group: the ranks that save together.
        listeners: get the events; closed with the run.
        on_closed: called when everything else is closed.

    Attributes:
        pool: the workers.
        arena: the snapshots' memory.
        replication: the copies of snapshots that other ranks keep.
        saver: makes the saves.
        retainer: removes old checkpoints.

    Raises:
        Exception: as :class:`stager.Checkpointer`; nothing is left open then.
    """

    def __init__(
        self,
        directory: str,
        config: StagerConfig,
        group: RankGroup,
        listeners: Listeners,
        on_closed: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._config = config
        self._group = group
        self._listeners = listeners
        self._preemption = _NOT_PREEMPTED
        self._signals = ExitStack()  # expect_preemption() adds what restores their handlers
        with ExitStack() as opened:
            opened.callback(on_closed)
            opened.callback(self._close_listeners)  # late, because everything that is closed before may post an event
            opened.callback(self._signals.close)
            opened.callback(group.close)
            setup.check_for_ranks(config, group)
            self._lock_fd = take_directory(
                directory,
                group,
                config.persistence.lock_timeout_secs,
                replicates=config.replication.partners > 0,
                take_over=lambda: open_here.take_over(directory),
            )
            opened.callback(os.close, self._lock_fd)
            setup.listen_to_files(listeners, config.telemetry, group)
            self.arena = setup.make_arena(config.arena, group)
            opened.callback(self.arena.close)
            segment_bytes = setup.agree_on_segment_bytes(config.persistence, group, self.arena)
            self.pool = setup.start_pool(config.workers, group.local_size, (self._lock_fd,))
            try:  # not one of the resources: how the pool ends depends on the saves in flight (ending.py)
                self.replication = Replication.open(config.replication, directory, group, self.pool)
                shared = self.arena, self.pool, group, self.replication.replicator
                self.saver = Saver(
                    config, directory, segment_bytes, *shared, on_done=self._on_done, post=listeners.post
                )
            except BaseException:
                self.pool.close(0)
                raise
            opened.callback(self.saver.close)
            persistence = config.persistence
            self._errors = SaveErrors(
                persistence.on_save_error, persistence.tolerate_failures, group, listeners.are_there
            )
            self._ending = Ending(
                self.saver, self.pool, self.replication, group.timeout_secs, self._errors, opened.pop_all()
            )
        rules = setup.retention_rules(config.retention)
        self.retainer = Retainer(self.pool, directory, rules, self._on_pruned)

    def belongs_to(self, owner: object) -> None:
        """Let the process's next Checkpointer of this directory finish this run, if nobody holds ``owner`` by then."""
        self._ending.resources.callback(open_here.add(owner, self._directory, self._ending.finish))

    # -- saving -------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> Save:
        """Make one save. Errors: :meth:`stager.Checkpointer.save`."""
        if self._group.is_coordinator:  # whose metrics are kept
            self.retainer.check_metrics(metrics)
        self._errors.judge()  # before this save counts: see NOTE [ All ranks raise in the same save() ]
        save = self.saver.new_save(step, metrics)
        self._errors.begin(save)
        try:
            self.saver.save(save, state)
        except BaseException as error:
            if not (isinstance(error, Exception) and self._errors.tolerates(save)):
                save.upload_completion.was_read = True
                self._errors.was_raised(save)
                raise
        self._errors.has_returned(save)
        self._errors.raise_due()
        return save

    def _on_done(self, save: Save) -> None:
        """Called when a save is committed or has failed, mostly in the pool's thread."""
        report = save.report
        if report.state is SaveState.COMMITTED:
            logger.info("step %d committed after %.2f s", report.step, report.committed_secs or 0.0)
            if self._group.is_coordinator:
                self.retainer.after_commit()
        self._errors.judge()

    def expect_preemption(self, signals: Iterable[int] | int, deadline_secs: float | None) -> Preemption:
        """Handle these signals from now on. Errors: :meth:`stager.Checkpointer.on_preemption`."""
        if self._preemption is not _NOT_PREEMPTED:
            raise UsageError(
                "on_preemption() may be called once only; keep the object that the first call returned, and use that"
            )
        numbers = (signals,) if isinstance(signals, int) else signals
        self._preemption = Preemption(numbers, deadline_secs)
        self._signals.callback(self._preemption.restore)
        if deadline_secs is not None:
            self.arena.wait_no_longer_than(self._preemption.remaining_secs)
        return self._preemption

    # -- removing -----------------------------------------------------------------------------------------------

    def delete(self, step: int) -> PruneReport:
        """Remove the checkpoint of one step. Errors: :meth:`stager.Checkpointer.delete`."""
        if step in self._config.retention.protect:
            raise UsageError(f"the checkpoint of step {step} is in retention.protect; take it out of there first")
        self.saver.wait_for_saves(lambda save: save.step == step)
        try:
            report = self.retainer.remove(step)
        except CheckpointNotFoundError:
            if self._group.is_alone:
                raise
            self.replication.replicator.forget(step)
            return PruneReport((), 0, False)
        (verdict,) = report.verdicts
        if verdict.fate is PruneFate.LEFT:
            raise StorageError(None, f"the checkpoint was not removed: {verdict.reason}", verdict.path)
        self.replication.replicator.forget(step)  # else a run that crashes could bring it back from memory
        return report

    def _on_pruned(self, report: PruneReport) -> None:
        removed = report.steps(PruneFate.REMOVED)
        self.saver.completion.forget_base({*report.damaged, *removed})
        if removed or report.steps(PruneFate.LEFT):
            self._listeners.post(lambda: PrunedEvent(report=report))

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self, timeout: float | None, *, has_failed: bool) -> None:
        """Finish the saves, and close everything. Errors and arguments: :meth:`Ending.finish`."""
        self._ending.finish(timeout, self._preemption.remaining_secs(), has_failed=has_failed)

    def abandon(self) -> None:
        """Close the lock's descriptor in a forked child: otherwise the child would hold the directory."""
        with suppress(OSError):
            os.close(self._lock_fd)

    def _close_listeners(self) -> None:
        limits = self._config.telemetry.listen_timeout_secs, self._preemption.remaining_secs()
        self._listeners.close(min(limit for limit in limits if limit is not None))
