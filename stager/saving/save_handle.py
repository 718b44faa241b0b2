"""What ``save()`` returns: a save as its caller sees it."""

from __future__ import annotations

from stager.saving.save import ReadTrackingFuture, Save
from stager.telemetry.report import SaveReport, SaveState
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo


class SaveHandle:
    """One save, as :meth:`stager.Checkpointer.save` returns it.

    Attributes:
        step: the training step.
        save_id: a nonce, the same on all ranks that save together; it names the partial directory.
        staging_completion: resolves when the snapshot is whole and the workers have it. From then on the state may be
            mutated, and the checkpoint will be committed even if this process is killed.
        upload_completion: resolves to the :class:`~stager.CheckpointInfo` when the checkpoint is durable and committed.
            Its exception says why the save failed. It is cancelled when the save was skipped.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self.step: int = save.step
        self.save_id: str = save.save_id
        self.staging_completion: ReadTrackingFuture[None] = save.staging_completion
        self.upload_completion: ReadTrackingFuture[CheckpointInfo] = save.upload_completion

    @property
    def state(self) -> SaveState:
        """How far the save is."""
        return self._save.state

    @property
    def report(self) -> SaveReport:
        """The figures so far. They are final once ``upload_completion`` is done."""
        return self._save.report

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self.state}>"
