"""torch_checkpointing, Meta's successor of ``torch.distributed.checkpoint._experimental``, over stager.

:class:`StagerCheckpointManager` is its ``CheckpointManager`` with both of these, each of which works without the other:

:class:`StagerCheckpointStager`    takes the place of its ``DefaultStager``
:class:`StagerStorageConfig`       takes the place of its ``LocalFileSystemStorageConfig``: files have its names and bytes,
                                   and the directory is a checkpoint of stager, committed at once, hashed and synced
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch_checkpointing import AsyncCheckpointSaver, AsyncCheckpointSaverConfig, CheckpointManager

from stager.integrations.torch_checkpointing_parts.staging import StagerCheckpointStager
from stager.integrations.torch_checkpointing_parts.storage import StagerStorage, StagerStorageConfig
from stager.workers.errors import ConfigError, UsageError

__all__ = ["StagerCheckpointManager", "StagerCheckpointStager", "StagerStorage", "StagerStorageConfig"]


class StagerCheckpointManager(CheckpointManager):
    """``CheckpointManager`` with stager's staging, and stager's storage unless ``storage_config`` names another.

    ``Config``, ``save()``, ``load()``, ``lock()``, ``prewarm_staging()`` and ``close()`` are those of torch_checkpointing.

    Raises:
        ConfigError: with stager's storage, checkpoints would be written to their final names at once
            (``write_to_temp_dir=False``, or no barrier), or an item into a directory of its own.
        UsageError: this version of torch_checkpointing keeps its stager elsewhere.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """The configuration of torch_checkpointing's own manager."""

        def build(self) -> StagerCheckpointManager:
            """Make the manager."""
            return StagerCheckpointManager(self)

    def __init__(self, config: CheckpointManager.Config | None = None) -> None:
        config = self.Config() if config is None else config
        if config.storage_config is None:
            config = replace(config, storage_config=StagerStorageConfig())
        if isinstance(config.storage_config, StagerStorageConfig):
            _refuse_what_cannot_be_committed(config)
        super().__init__(config)
        if not isinstance(config.save, AsyncCheckpointSaverConfig):
            return
        saver = self._saver
        if not isinstance(saver, AsyncCheckpointSaver) or not hasattr(saver, "_checkpoint_stager"):
            self.close()
            raise UsageError(
                "this version of torch_checkpointing keeps its stager where stager does not find it; make an "
                "AsyncCheckpointSaver with StagerCheckpointStager() yourself, or install torch_checkpointing 0.1.1"
            )
        saver._checkpoint_stager.close()
        saver._checkpoint_stager = StagerCheckpointStager(config.save.staging_config)


def _refuse_what_cannot_be_committed(config: CheckpointManager.Config) -> None:
    if config.save.writer_config.barrier_config is None:
        raise ConfigError(
            "writer_config has barrier_config=None, and without a barrier torch_checkpointing writes into the final "
            "directory and commits nothing; leave barrier_config and write_to_temp_dir out (with one rank, the default "
            "barrier costs nothing), or give storage_config=LocalFileSystemStorageConfig()"
        )
    if not config.save.writer_config.write_to_temp_dir:
        raise ConfigError(
            "writer_config has write_to_temp_dir=False, with which torch_checkpointing writes into the final directory and "
            "commits nothing; leave it out, or give storage_config=LocalFileSystemStorageConfig()"
        )
    for key, spec in {**config.items, "the default of the items": config.default}.items():
        if spec is not None and spec.layout is not None and "/" in spec.layout.file_path:
            raise ConfigError(
                f"the layout of {key} has file_path={spec.layout.file_path!r}, and a checkpoint of stager has no "
                "directories in it; take the / out, or give storage_config=LocalFileSystemStorageConfig()"
            )
