"""An open run: the pipeline of a Checkpointer, with the directory, the replicas and the retention of one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from stager.config import StagerConfig
from stager.exporting.weights_export import WeightsExport
from stager.ranks.rank_group import RankGroup
from stager.replication.replication import Replication
from stager.saving import setup
from stager.saving.destination import Destination
from stager.saving.pipeline import Pipeline
from stager.saving.retainer import Retainer
from stager.saving.save import Save
from stager.saving.sidecars import File
from stager.telemetry.listeners import Listeners
from stager.workers.checkpoint.directory.run_directory import checkpoint_names, newest_nbytes
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.maintenance.retention import PruneReport
from stager.workers.errors import UsageError

logger = logging.getLogger("stager")


class OpenRun(Pipeline):
    """A run's directory, locked, and everything that saves into it.

    Args:
        directory: of the run, absolute.
        config, group, listeners, on_closed: as of :class:`Pipeline`.

    Attributes:
        retainer: removes old checkpoints.
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
        super().__init__(config, group, listeners, on_closed)
        rules = setup.retention_rules(config.retention)
        self.retainer = Retainer(self.pool, directory, rules, lambda report: self.removed(directory, report))

    def _take_directories(self) -> None:
        self._lock = self.directories.take(self._directory)

    def _open_replication(self) -> Replication:
        return Replication.open(self._config.replication, self._directory, self._group, self.pool, self._lock)

    def _newest_nbytes(self) -> int:
        return newest_nbytes(self._directory)

    def save_step(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, File],
        export: WeightsExport | None,
    ) -> Save:
        """Save the checkpoint of a step. Errors: :meth:`stager.Checkpointer.save`."""
        if self._group.is_coordinator:  # whose metrics are kept
            self.retainer.check_metrics(metrics)
        name = checkpoint_name(step, self._config.persistence.name)
        return self.save(step, Destination(self._directory, name, self._lock), state, metrics, files, export)

    def _committed(self, save: Save) -> None:
        if self._group.is_coordinator:
            self.retainer.after_commit()

    def delete_step(self, step: int) -> PruneReport:
        """Remove the checkpoint of one step. Errors: :meth:`stager.Checkpointer.delete`."""
        if step in self._config.retention.protect:
            raise UsageError(f"the checkpoint of step {step} is in retention.protect; take it out of there first")
        given = checkpoint_name(step, self._config.persistence.name)
        report = self.delete(self._directory, checkpoint_names(self._directory).get(step, given), step)
        self.replication.replicator.forget(step)  # else a run that crashes could bring it back from memory
        return report
