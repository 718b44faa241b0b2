"""The pipeline: what it takes to save. It is opened in this order, and closed from the last to the first.

    the directories' locks -> the files that listen -> arena -> the exporter -> workers -> replication -> saver

Two kinds of it: ``OpenRun`` saves into the directory of one run (``open_run.py``); a plain ``Pipeline`` takes a directory
when a save names it for the first time. A Checkpointer with ``read_only=True`` has none. A pipeline holds no reference to
its Checkpointer, so that one that nobody holds any more can be told apart (``open_here.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from stager.config import StagerConfig
from stager.exporting.weights_export import WeightsExport
from stager.ranks.rank_group import RankGroup
from stager.replication.replication import Replication
from stager.replication.replicator import NoReplication
from stager.saving import setup
from stager.saving.destination import Destination
from stager.saving.directories import Directories
from stager.saving.ending import Ending
from stager.saving.exporter import Exporter, check_export
from stager.saving.preemption import Preemption
from stager.saving.save import Save
from stager.saving.save_errors import SaveErrors
from stager.saving.saver import Saver
from stager.saving.sidecars import NO_SIDECARS, File, read_sidecars
from stager.telemetry.event import PrunedEvent
from stager.telemetry.listeners import Listeners
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.commit.persist import discard_partial
from stager.workers.checkpoint.maintenance.retention import (
    PruneFate,
    PruneReport,
    PruneVerdict,
    refuse_protected,
    remove,
)
from stager.workers.errors import CheckpointNotFoundError, StorageError, UsageError

logger = logging.getLogger("stager")

_NOT_PREEMPTED = Preemption()  # until expect_preemption() is called


class Pipeline:
    """Everything that saves.

    Args:
        group: the ranks that save together.
        listeners: get the events; closed with the pipeline.
        on_closed: called when everything else is closed.

    Attributes:
        directories: those that saves go to.
        pool: the workers.
        arena: the snapshots' memory.
        replication: the copies of snapshots that other ranks keep.
        exporter: exports weights where a save asks for it.
        saver: makes the saves.

    Raises:
        Exception: as :class:`stager.Checkpointer`; nothing is left open then.
    """

    def __init__(
        self, config: StagerConfig, group: RankGroup, listeners: Listeners, on_closed: Callable[[], None]
    ) -> None:
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
            persistence = config.persistence
            replicates = config.replication.partners > 0
            self.directories = Directories(
                group, persistence.lock_timeout_secs, partial(setup.check_for_storage, config), replicates=replicates
            )
            opened.callback(self.directories.close)
            self._take_directories()
            setup.listen_to_files(listeners, config.telemetry, group)
            self.arena = setup.make_arena(config.arena, group)
            opened.callback(self.arena.close)
            self.exporter = Exporter(partial(setup.start_export_pool, config.workers))
            opened.callback(self.exporter.close)
            segment_bytes = setup.agree_on_segment_bytes(persistence, group, self.arena)
            self.pool = setup.start_pool(config.workers, group.local_size)
            try:  # not one of the resources: how the pool ends depends on the saves in flight (ending.py)
                self.replication = self._open_replication()
                shared = self.arena, self.pool, group, self.replication.replicator
                self.saver = Saver(
                    config,
                    self._newest_nbytes,
                    segment_bytes,
                    *shared,
                    on_done=self._on_done,
                    post=listeners.post,
                )
            except BaseException:
                self.pool.close(0)
                raise
            opened.callback(self.saver.close)
            self._errors = SaveErrors(
                persistence.on_save_error, persistence.tolerate_failures, group, listeners.are_there
            )
            workers = self.saver, self.pool, self.replication, self.exporter
            self._ending = Ending(*workers, group.timeout_secs, self._errors, opened.pop_all())

    # -- what an OpenRun does in another way

    def _take_directories(self) -> None:
        """Take the directories that are known before the first save."""

    def _open_replication(self) -> Replication:
        """Restore from replicas, and begin to make them."""
        return Replication("", NoReplication())

    def _newest_nbytes(self) -> int:
        """Return about how many bytes the newest checkpoint has; 0: nobody knows."""
        return 0

    def _committed(self, save: Save) -> None:
        """Called when a save is committed, mostly in the pool's thread."""

    # -- saving -------------------------------------------------------------------------------------------------

    def belongs_to(self, owner: object) -> None:
        """Let the process's next Checkpointer of these directories finish this one, if nobody holds ``owner`` by then."""
        self.directories.belong_to(owner, self._ending.finish)

    def save(
        self,
        step: int,
        destination: Destination,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, File],
        export: WeightsExport | None,
    ) -> Save:
        """Make one save. Errors: :meth:`stager.Checkpointer.save`."""
        check_export(export)
        # Rank 0's are kept; the others need not have the files.
        sidecars = read_sidecars(files) if files and self._group.is_coordinator else NO_SIDECARS
        self._errors.judge()  # before this save counts: see NOTE [ All ranks raise in the same save() ]
        save = self.saver.new_save(step, destination, metrics, sidecars)
        self._errors.begin(save)
        if export is not None and self._group.is_coordinator:
            self._expect_export(export, save)
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

    def _expect_export(self, export: WeightsExport, save: Save) -> None:
        try:
            self.exporter.accept(export, save)
        except BaseException as error:
            # Raised whatever on_save_error says: each later save would fail in the same way. The other ranks must not wait.
            save.upload_completion.was_read = True
            self.saver.refuse(save, error)
            self._errors.was_raised(save)
            raise

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs a callback of one of a save's Futures."""
        return self.saver.in_callback or self.exporter.in_callback

    def _on_done(self, save: Save) -> None:
        report = save.report
        if report.state is SaveState.COMMITTED:
            logger.info("%s committed after %.2f s", save.shown, report.committed_secs or 0.0)
            self._committed(save)
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

    def delete(self, directory: str, name: str, step: int) -> PruneReport:
        """Remove a checkpoint, or keep saves in flight from becoming it. Errors: :meth:`stager.Checkpointer.delete`.

        1. Withdraw its saves in flight: they are cancelled, unless they are committed just now.
        2. Wait until they have ended.
        3. Remove what is there.
        """
        refuse_protected(directory, step)  # before anything is lost
        path = Destination.path_of(directory, name)
        in_flight = [save for save in self.saver.completion.in_flight() if save.destination.path == path]
        for save in in_flight:
            self.saver.completion.withdraw(save)
        self.saver.wait_for_saves(in_flight)
        for save in in_flight:
            if save.state is SaveState.COMMITTED:  # just before: then what was to keep it from that is still there
                self.pool.submit(discard_partial, directory, name, save.save_id).result()
        try:
            report = self.pool.submit(remove, directory, step, name).result()
        except CheckpointNotFoundError:
            if self._group.is_alone and not in_flight:
                raise
            verdicts = [PruneVerdict(step, path, PruneFate.REMOVED, "its save was cancelled")] if in_flight else []
            return PruneReport(tuple(verdicts), 0, False)
        (verdict,) = report.verdicts
        if verdict.fate is PruneFate.LEFT:
            raise StorageError(None, f"the checkpoint was not removed: {verdict.reason}", verdict.path)
        self.removed(directory, report)
        return report

    def removed(self, directory: str, report: PruneReport) -> None:
        """Tell whoever has to know what was removed, or could not be."""
        gone = [verdict for verdict in report.verdicts if verdict.damaged or verdict.fate is PruneFate.REMOVED]
        self.saver.completion.forget_base(directory, {verdict.name for verdict in gone})
        if report.steps(PruneFate.REMOVED) or report.steps(PruneFate.LEFT):
            self._listeners.post(lambda: PrunedEvent(report=report))

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self, timeout: float | None, *, has_failed: bool) -> None:
        """Finish the saves, and close everything. Errors and arguments: :meth:`Ending.finish`."""
        self._ending.finish(timeout, self._preemption.remaining_secs(), has_failed=has_failed)

    def abandon(self) -> None:
        """Let go of the directories, and of the checkpoints that are exported, in a forked child."""
        self.directories.abandon()
        self.exporter.abandon()

    def _close_listeners(self) -> None:
        limits = self._config.telemetry.listen_timeout_secs, self._preemption.remaining_secs()
        self._listeners.close(min(limit for limit in limits if limit is not None))
