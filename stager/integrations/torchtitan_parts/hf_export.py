"""The last step's weights in the layout of Hugging Face (``last_save_in_hf``).

    save()    stage the weights, under their Hugging Face names        .hf_export/weights, written by workers
    finish()  wait for the commit; rank 0 writes the files of weights  .hf_export/new-ID/step-1000
              and gives the directory its name                         step-1000

What had the name before is removed, or set aside, when the export has it (``export_directory.py``). A training that is
killed meanwhile leaves no name in the folder that torchtitan or stager takes for a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from stager.config import StagerConfig
from stager.exporting.weights import export_weights
from stager.integrations.torchtitan_parts.contents import step_name, step_path
from stager.integrations.torchtitan_parts.export_directory import ExportDirectory
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.workers.errors import StorageError, UsageError
from stager.workers.faults import point

logger = logging.getLogger("stager")


class HFExport:
    """The export of one step. Where several ranks train, every rank makes one and calls the same methods.

    Args:
        config: of stager, as for the checkpoints; one that removes nothing is made of it.
        directory: where the export lies until it has its name.
        step: that gives it the name.
        writes_files: of one rank only.

    Raises:
        Exception: as of :class:`stager.PathCheckpointer`.
    """

    def __init__(self, config: StagerConfig, directory: ExportDirectory, step: int, *, writes_files: bool) -> None:
        self._directory, self._step, self._writes_files = directory, step, writes_files
        self._path = step_path(directory.folder, step)
        rules = {"retention": type(config.retention)(), "replication": type(config.replication)()}
        self._checkpointer = PathCheckpointer(config.model_copy(update=rules))

    def save(self, weights: Mapping[str, Any]) -> SaveHandle:
        """Stage the weights. Returns the save."""
        return self._checkpointer.save(self._directory.weights, weights, step=self._step)

    def finish(self, forget: Callable[[int], object]) -> None:
        """Wait for the commit, and write the files of weights.

        Args:
            forget: lets no later run restore a checkpoint of the step, whose name the export gets.

        Raises:
            StorageError, UsageError: the files were not written; says where the weights are.
            Exception: as of ``PathCheckpointer.close()``.
        """
        self._checkpointer.close()
        if not self._writes_files:
            return
        try:
            new = self._directory.new(step_name(self._step))
            export_weights(self._directory.weights, new)
            point("hf_export.written")
            forget(self._step)
            self._directory.publish(new)
        except OSError as error:
            raise StorageError(error.errno, self._what_to_do(error), self._path) from error
        except UsageError as error:
            raise UsageError(f"{self._path}: {self._what_to_do(error)}") from error
        self._directory.clear()
        logger.info("%s has the weights, for from_pretrained()", self._path)

    def _what_to_do(self, error: Exception) -> str:
        weights = self._directory.weights
        return (
            f"the last weights were not exported: {error}. They are whole in {weights}, until a later training exports; "
            f"correct this, then call stager.export_weights({weights!r}, OUT), OUT being a new directory"
        )
