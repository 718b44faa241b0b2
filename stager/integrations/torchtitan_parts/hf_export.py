"""The last step's weights in the layout of Hugging Face (``last_save_in_hf``).

    save()    stage the weights, under their Hugging Face names        checkpoint/.hf_export/weights, written by workers
    finish()  wait for the commit; rank 0 writes the files of weights  checkpoint/.hf_export/model
              and gives the directory its name                         checkpoint/step-1000

The names in between have no ``step-`` in them, so a training that is killed meanwhile leaves nothing that torchtitan or
stager takes for a checkpoint. The next export replaces it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from stager.config import StagerConfig
from stager.exporting.new_directory import refuse_if_taken
from stager.exporting.weights import export_weights
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest

logger = logging.getLogger("stager")

_DIRECTORY = ".hf_export"


class HFExport:
    """One export. Where several ranks train, every rank makes one and calls the same methods.

    Args:
        config: of stager, as for the checkpoints; one that removes nothing is made of it.
        path: of the exported directory.
        writes_files: of one rank only.

    Raises:
        UsageError: something else than an earlier export is at ``path``.
        Exception: as of :class:`stager.PathCheckpointer`.
    """

    def __init__(self, config: StagerConfig, path: str, *, writes_files: bool) -> None:
        self._path, self._writes_files = path, writes_files
        if not has_own_manifest(path):  # a checkpoint of this step is removed first
            refuse_if_taken(path, force=True)
        self._directory = os.path.join(os.path.dirname(path), _DIRECTORY)
        self._weights = os.path.join(self._directory, "weights")
        rules = {"retention": type(config.retention)(), "replication": type(config.replication)()}
        self._checkpointer = PathCheckpointer(config.model_copy(update=rules))

    def save(self, weights: Mapping[str, Any], step: int) -> SaveHandle:
        """Stage the weights. Returns the save."""
        return self._checkpointer.save(self._weights, weights, step=step)

    def finish(self, delete: Callable[[int], object]) -> None:
        """Wait for the commit, and write the files of weights.

        Args:
            delete: removes the checkpoint of a step, if one has the name of the export.

        Raises:
            Exception: as of ``PathCheckpointer.close()`` and of :func:`stager.export_weights`.
        """
        self._checkpointer.close()
        if not self._writes_files:
            return
        exported = os.path.join(self._directory, "model")
        step = export_weights(self._weights, exported, force=True).step
        if has_own_manifest(self._path):
            delete(step)
        if os.path.lexists(self._path):  # an earlier export
            os.rename(self._path, os.path.join(self._directory, "former"))
        os.rename(exported, self._path)
        shutil.rmtree(self._directory)
        logger.info("%s has the weights, for from_pretrained()", self._path)
