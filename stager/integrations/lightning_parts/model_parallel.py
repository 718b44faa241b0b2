"""The strategy for FSDP2 and tensor parallel: all ranks save one checkpoint together, each its own shards.

The layout is that of Lightning's ``ModelParallelStrategy``, which loads it: ``state_dict`` and ``optimizer_0`` as
``torch.distributed.checkpoint`` has them, and the rest of what Lightning saves in ``meta.pt``.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from stager import ArgumentError, Event, StagerConfig, load_checkpoint, load_config
from stager.integrations.lightning_parts.earlier_run import finish_earlier_run
from stager.integrations.lightning_parts.ranks import of_all_ranks, of_rank_0, own_rank
from stager.integrations.lightning_parts.scratch import is_scratch
from stager.integrations.lightning_parts.whole_file import META
from stager.integrations.lightning_parts.writer import CheckpointWriter, absolute, optimizers_of
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.errors import RankFailedError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ModelParallelStrategy as _Base
else:
    _Base = object  # lightning's class or pytorch_lightning's comes behind it

logger = logging.getLogger("stager")

_AS_IT_IS = StateDictOptions()  # no copy to the CPU: a snapshot is taken from the device


class ModelParallelMixin(_Base):
    """Lightning's ``ModelParallelStrategy``, with sharded checkpoints that stager writes and loads.

    Args:
        options: as of ``ModelParallelStrategy``.
        config: as of :class:`stager.PathCheckpointer`. ``ranks.together`` is "auto" whatever it says.
        on_event: gets every event of a save, in a thread of its own; None: nobody does.

    Raises:
        ArgumentError: ``save_distributed_checkpoint=False``.
        ConfigError: the configuration is wrong, or has rules for ``retention``: ``ModelCheckpoint`` has its own.
    """

    def __init__(
        self,
        *options: Any,
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        on_event: Callable[[Event], object] | None = None,
        **more_options: Any,
    ) -> None:
        super().__init__(*options, **more_options)
        if not self._save_distributed_checkpoint:
            raise ArgumentError(
                "save_distributed_checkpoint is False, and this strategy saves shards: they load on any number of ranks, "
                "and `stager export` makes one file of them; leave it out"
            )
        loaded = load_config(config)
        together = loaded.model_copy(update={"ranks": loaded.ranks.model_copy(update={"together": "auto"})})
        self.stager_writer = CheckpointWriter(together, on_event)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state, as it lies on the device."""
        return get_model_state_dict(self.model, options=_AS_IT_IS)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state by the names of its parameters, as it lies on the device."""
        (inner,) = optimizers_of([optimizer])
        return get_optimizer_state_dict(self.model, inner, options=_AS_IT_IS)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Take a snapshot of this rank's shards, and return; workers of all ranks write one checkpoint. Every rank calls it.

        Raises:
            ArgumentError: ``storage_options`` are given.
            Exception: as :meth:`stager.PathCheckpointer.save`; and the error of an earlier save, once and on every rank.
        """
        if storage_options is not None:
            raise ArgumentError(
                "storage_options are for object stores, and stager writes to file systems; save without them"
            )
        path = of_rank_0(os.fspath(filepath))
        if is_scratch(path):
            super().save_checkpoint(checkpoint, path)
            return
        state = {"state_dict": checkpoint.pop("state_dict")}
        for number, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state
        files = None
        if own_rank() == 0:
            meta = io.BytesIO()
            torch.save(checkpoint, meta)
            files = {META: meta.getvalue()}
        self.stager_writer.save(path, state, step=checkpoint["global_step"], files=files)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint into the model and the optimizers; return the rest of it. Every rank calls it.

        Each rank loads its own shards, whatever the number of ranks was. Checkpoints of Lightning's own are loaded as
        Lightning does it.

        Args:
            weights_only: False: the rest may hold objects that are not plain data, which runs code from the checkpoint.
                None: as ``loading.allow_pickle`` says. Lightning 2.6 does not pass on what ``fit(weights_only=)`` was given.

        Raises:
            RankFailedError: another rank could not load it.
            Exception: as :func:`stager.load_checkpoint`.
        """
        path = of_rank_0(absolute(checkpoint_path))
        self.stager_writer.wait_for(path)
        if own_rank() == 0 and not self.stager_writer.is_open:
            finish_earlier_run(os.path.dirname(path), self.stager_writer.config.persistence.lock_timeout_secs)
        is_ours = of_rank_0(has_own_manifest(path))  # no rank looks before rank 0 has waited
        if not is_ours:
            theirs: dict[str, Any] = super().load_checkpoint(path, weights_only=weights_only)
            return theirs
        problem: Exception | None = None
        try:
            meta = self._load_shards(path)
        except Exception as error:  # noqa: BLE001  # raised below, when the other ranks know of it
            problem = error
        failed = [rank for rank, is_well in enumerate(of_all_ranks(problem is None)) if not is_well]
        if problem is not None:
            raise problem
        if failed:
            raise RankFailedError(f"{path}: rank {failed[0]} could not load it; see the error there", tuple(failed))
        allowed = self.stager_writer.config.loading.allow_pickle if weights_only is None else not weights_only
        rest: dict[str, Any] = torch.load(io.BytesIO(meta), weights_only=not allowed)
        return rest

    def _load_shards(self, path: str) -> bytes:
        """Load this rank's shards; return what is in ``meta.pt``."""
        model: Any = self.model
        optimizers = optimizers_of(self.optimizers)
        is_strict = self.lightning_module.strict_loading
        into: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
        for number, optimizer in enumerate(optimizers):
            into[f"optimizer_{number}"] = get_optimizer_state_dict(model, optimizer)
        loading = self.stager_writer.config.loading
        loaded = load_checkpoint(
            path,
            into,
            strict=is_strict,
            keys=list(into),
            allow_pickle=loading.allow_pickle,
            safe_globals=loading.safe_globals,
        )
        model.load_state_dict(into["state_dict"], strict=is_strict)
        for number, optimizer in enumerate(optimizers):
            set_optimizer_state_dict(model, optimizer, optim_state_dict=into[f"optimizer_{number}"])
        return loaded.files[META]

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove the checkpoint at ``filepath``, as soon as the one that was saved last is committed."""
        if self.is_global_zero:
            self.stager_writer.remove(filepath)

    def teardown(self) -> None:
        """Wait until everything is committed and removed, and stop the workers. The next save starts them again.

        Raises:
            Exception: the error of a save that nobody has seen. Only logged if ``fit()`` is failing already.
        """
        try:
            self.stager_writer.close()
        finally:
            super().teardown()
