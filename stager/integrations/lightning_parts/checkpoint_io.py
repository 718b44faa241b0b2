"""The CheckpointIO of single device and DDP: Lightning asks rank 0 to save and to remove, and every rank to load."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from stager import ArgumentError, CheckpointNotFoundError, Event, StagerConfig, load_checkpoint, load_config
from stager.integrations.lightning_parts.earlier_run import finish_earlier_run
from stager.integrations.lightning_parts.ranks import of_rank_0, own_rank
from stager.integrations.lightning_parts.scratch import is_scratch
from stager.integrations.lightning_parts.writer import CheckpointWriter, absolute
from stager.workers.errors import StagerError

logger = logging.getLogger("stager")

_OF_SLURM = re.compile(r"hpc_ckpt_([0-9]+)\.ckpt")


class CheckpointIOMixin:
    """Saves what Lightning gives a CheckpointIO with stager.

    Args:
        config: as of :class:`stager.PathCheckpointer`. ``ranks.together`` is false whatever it says: rank 0 saves alone.
        on_event: gets every event of a save, in a thread of its own; None: nobody does.

    Raises:
        ConfigError: the configuration is wrong, or has rules for ``retention``: ``ModelCheckpoint`` has its own.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        loaded = load_config(config)
        alone = loaded.model_copy(update={"ranks": loaded.ranks.model_copy(update={"together": False})})
        self.stager_writer = CheckpointWriter(alone, on_event)

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Take a snapshot of a checkpoint, and return; workers write it to the directory ``path`` while training goes on.

        What Lightning saves only for itself (``scratch.py``) is written as Lightning does it, before this returns.

        Args:
            checkpoint: tensors and plain data. Other objects are pickled, and need ``weights_only=False`` to be loaded.
            path: on a file system.
            storage_options: must be None.

        Raises:
            ArgumentError: ``storage_options`` are given.
            Exception: as :meth:`stager.PathCheckpointer.save`; and the error of an earlier save, once.
        """
        if storage_options is not None:
            raise ArgumentError(
                "storage_options are for object stores, and stager writes to file systems; save without them"
            )
        if is_scratch(path):
            os.makedirs(os.path.dirname(absolute(path)), exist_ok=True)
            torch.save(dict(checkpoint), path)
            return
        step = checkpoint.get("global_step")
        self.stager_writer.save(path, checkpoint, step=step if type(step) is int else None)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint: stager's, or a file of Lightning's own. Every rank calls it, and loads what rank 0 names.

        Saves to it that are in flight are waited for, also those that workers of a killed run still finish.

        Args:
            path: of the checkpoint.
            map_location: a device; None: the CPU.
            weights_only: False: objects that are not plain data are unpickled, which runs code from the checkpoint. None: as
                ``loading.allow_pickle`` says.

        Raises:
            ArgumentError: ``map_location`` is no device.
            CheckpointNotFoundError: there is no checkpoint at ``path``.
            Exception: as :func:`stager.load_checkpoint`.
        """
        if not isinstance(map_location, str | torch.device | None):
            raise ArgumentError(f"map_location is {map_location!r}; give a device, or None for the CPU")
        found = _on_rank_0(lambda: self._settled(absolute(path)))
        loading = self.stager_writer.config.loading
        allowed = loading.allow_pickle if weights_only is None else not weights_only
        state = load_checkpoint(found, allow_pickle=allowed, safe_globals=loading.safe_globals).state
        if map_location is None:
            return dict(state)
        return dict(tree_map_only(torch.Tensor, lambda tensor: tensor.to(map_location), state))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the checkpoint at ``path``, as soon as the one that was saved last is committed.

        Until then, a kill would leave none. A save to ``path`` that is still in flight by then is cancelled.
        """
        self.stager_writer.remove(path)

    def teardown(self) -> None:
        """Wait until everything is committed and removed, and stop the workers. The next save starts them again.

        Raises:
            Exception: the error of a save that nobody has seen. Only logged if ``fit()`` is failing already.
        """
        self.stager_writer.close()

    def _settled(self, path: str) -> str:
        """Wait for saves to ``path``; return it, or what it has to be if it names no checkpoint."""
        self.stager_writer.wait_for(path)
        if not self.stager_writer.is_open:  # else this process has the directory, or another one
            timeout_secs = self.stager_writer.config.persistence.lock_timeout_secs
            finish_earlier_run(os.path.dirname(path), timeout_secs)
        if not os.path.exists(path) and _OF_SLURM.fullmatch(os.path.basename(path)):
            return _newest_of_slurm(path)
        return path


def _on_rank_0(find: Callable[[], str]) -> str:
    """Return what ``find`` returns on rank 0, or raise its error on every rank."""
    path: str | None = None
    problem: StagerError | OSError | None = None
    if own_rank() == 0:
        try:
            path = find()
        except (StagerError, OSError) as error:
            problem = error
    path, problem = of_rank_0((path, problem))
    if problem is not None:
        raise problem
    assert path is not None
    return path


def _newest_of_slurm(path: str) -> str:
    """Return the checkpoint that Lightning means by "hpc".

    Lightning takes the digits of every name that has ``hpc_ckpt_`` in it. While a save is unfinished, the digits of its save
    id are among them, and the path that Lightning makes of them does not exist.
    """
    directory = os.path.dirname(path)
    names = os.listdir(directory) if os.path.isdir(directory) else []
    numbers = [int(match[1]) for name in names if (match := _OF_SLURM.fullmatch(name)) is not None]
    if not numbers:
        raise CheckpointNotFoundError(
            None,
            "the job was killed while it saved this checkpoint, and there is no earlier one of this kind; start again, with "
            'ckpt_path="last" if ModelCheckpoint saved one',
            path,
        )
    return os.path.join(directory, f"hpc_ckpt_{max(numbers)}.ckpt")
