"""A ``ModelCheckpoint`` that knows that its checkpoints appear later."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any
from weakref import proxy

from stager.config import load_config
from stager.integrations.lightning_parts.earlier_run import finish_earlier_run, newest_in
from stager.integrations.lightning_parts.guarding import refuse_other_strategies, writer_of

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint as _Base
else:
    _Base = object  # lightning's class or pytorch_lightning's comes behind it

logger = logging.getLogger("stager")


class _WithoutLoggers:
    """A trainer that shows no loggers, so that ``ModelCheckpoint`` tells them nothing yet."""

    loggers = ()

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class ModelCheckpointMixin(_Base):
    """What differs from Lightning's ``ModelCheckpoint``; all arguments are the same.

    - Loggers hear of a checkpoint (``after_save_checkpoint``) when every checkpoint that this callback names is durable: in
      the training thread, when a later batch starts or the fit ends.
    - ``ckpt_path="last"`` takes the checkpoint that was committed last, if the run was killed before the one that "last"
      names was committed. Lightning would train from the beginning.
    """

    _untold: tuple[str, ...] = ()  # paths of checkpoints that the loggers have not heard of

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: that of Lightning's ``ModelCheckpoint``.

        So a run that goes on with the other class still knows its best checkpoints.
        """
        key: str = super().state_key
        return key.removeprefix("Stager")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Do what ``ModelCheckpoint`` does, unless the trainer could not load what stager saves.

        Raises:
            UsageError: the trainer's strategy would not ask stager to load a checkpoint.
        """
        refuse_other_strategies(trainer)
        super().setup(trainer, pl_module, stage)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        writer = writer_of(trainer)
        if writer is None:
            super()._save_checkpoint(trainer, filepath)
            return
        super()._save_checkpoint(_WithoutLoggers(trainer), filepath)
        self._untold = (*self._untold, filepath)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Tell the loggers of checkpoints that have become durable."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._tell(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell the loggers of the last checkpoints: the trainer has waited for their commits."""
        super().on_fit_end(trainer, pl_module)
        self._tell(trainer)

    def _tell(self, trainer: Any) -> None:
        writer = writer_of(trainer)
        if not self._untold or writer is None or any(map(writer.is_in_flight, self._untold)):
            return
        is_there, self._untold = any(map(os.path.exists, self._untold)), ()
        if trainer.is_global_zero and is_there:  # else their saves failed, which raises elsewhere
            for logger_ in trainer.loggers:
                logger_.after_save_checkpoint(proxy(self))

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        directory = self._ModelCheckpoint__resolve_ckpt_dir(trainer)
        writer = writer_of(trainer)
        config = load_config() if writer is None else writer.config
        finish_earlier_run(os.fspath(directory), config.persistence.lock_timeout_secs)
        found: set[str] = super()._find_last_checkpoints(trainer)
        if not self.save_last or any(map(os.path.exists, found)):
            return found
        newest = newest_in(os.fspath(directory), self.FILE_EXTENSION)
        if newest is None:
            return found
        logger.warning(
            "%s: the run was killed before its last checkpoint was committed; resumes from %s, the one before it",
            directory,
            newest,
        )
        return {newest}
