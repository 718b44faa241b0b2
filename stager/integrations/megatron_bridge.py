"""Megatron-Core and Megatron-Bridge: the sharded part of a checkpoint, written by stager's workers while training goes on.

:class:`StagerSaveStrategy` is a strategy of ``megatron.core.dist_checkpointing``. :class:`StagerCheckpointManager` puts it
into Megatron-Bridge, by its protocol for checkpoint managers.

NOTE [ Which files, and who commits ]
    iter_0000100/                 made by Megatron, with common.pt, metadata.json, run_config.yaml and so on
        .metadata                 DCP's index, written here when all ranks' files are there
        rank-00000/shards/        what rank 0 saves: a checkpoint of stager's, with the hashes of its bytes
        rank-00001/shards/ ...
    latest_checkpointed_iteration.txt
  1. Megatron decides which rank saves which shard; ``.metadata`` says in which file of which rank each one lies. So
     Megatron's own load strategy reads the checkpoint, with any number of ranks.
  2. Megatron's queue of asynchronous saves runs one function per save in a process of its own, and polls it. Here that
     function only waits until stager has committed this rank's files.
  3. Then Megatron calls the functions that finish a save, on all ranks: first the one that writes ``.metadata``, then
     Megatron's own, of which the last lets ``latest_...`` name the checkpoint. A kill before that leaves a directory that
     nothing names.
"""

from __future__ import annotations

import inspect
import io
import os
import pickle
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.utils import _DistWrapper

from stager.config import StagerConfig, load_config
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.documents.names import number_in
from stager.workers.checkpoint.formats.dcp import METADATA_NAME
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import ConfigError

Config = str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None
"""What a ``PathCheckpointer`` takes as its configuration."""

_SHARDS = "shards"
_ENDED = "ended"
_POLL_SECS = 0.05

Places = list[tuple[MetadataIndex, _StorageInfo]]


class StagerSaveStrategy(AsyncSaveShardedStrategy):
    """Saves what ``torch_dist`` saves: ``dist_checkpointing.save(state, path, StagerSaveStrategy())``. Every rank makes one.

    With ``async_sharded_save=True`` that returns when the snapshot is taken. The request that it returns goes to Megatron's
    ``AsyncCallsQueue``; its ``execute_sync()`` waits. ``dist_checkpointing.load()`` reads the checkpoint without stager.

    Args:
        config: as of :class:`stager.PathCheckpointer`. Each rank saves for itself, in the format ``dcp``.

    Attributes:
        checkpointer: the :class:`stager.PathCheckpointer` of this rank, for ``guard()``, ``listen()``, ``warmup()``.

    Raises:
        ConfigError: another format is set; ``ranks.together`` is true; ``arena.when_full`` is ``skip``.
        Exception: as of :class:`stager.PathCheckpointer`.
    """

    checkpointer: PathCheckpointer

    def __init__(self, config: Config = None) -> None:
        super().__init__("torch_dist", 1)  # which Megatron's metadata.json names, and which loads it
        self.checkpointer = PathCheckpointer(_config(load_config(config)))

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects are saved with the tensors."""
        return True

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: str | os.PathLike[str]) -> AsyncRequest:
        """Take a snapshot of this rank's shards, and let the workers write them.

        Args:
            sharded_state_dict: of Megatron's ``ShardedTensor`` and ``ShardedObject``.
            checkpoint_dir: which exists, and which all ranks see.

        Returns:
            What Megatron's queue of asynchronous saves runs, and how it finishes.

        Raises:
            Exception: as of :meth:`stager.PathCheckpointer.save`, or of torch's planning.
        """
        directory = local_path(checkpoint_dir, "checkpoint_dir")
        # Of replicas only the main one, as Megatron's own strategy does.
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        ranks = _DistWrapper(None, True, 0)
        plan, metadata = _plan(planner, mcore_to_pyt_state_dict(by_key, False), ranks)
        values = {str(number): _value(planner.resolve_data(item)) for number, item in enumerate(plan.items)}
        own = os.path.join(directory, f"rank-{torch.distributed.get_rank():05d}")
        ended = os.path.join(own, _ENDED)
        files.remove(ended)  # of an earlier save into this directory
        step = number_in(os.path.basename(directory)) or 0
        handle = self.checkpointer.save(os.path.join(own, _SHARDS), values, step=step)
        handle.upload_completion.add_done_callback(lambda _: Path(ended).touch())
        finish = partial(_finish, ranks, handle, plan, metadata, directory)
        return AsyncRequest(_wait, (ended, os.getpid()), [finish])

    def close(self) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent.

        Raises:
            Exception: as of :meth:`stager.PathCheckpointer.close`.
        """
        self.checkpointer.close()


class StagerCheckpointManager:
    """A checkpoint manager of Megatron-Bridge (0.4 and later) whose sharded files stager writes.

    In the configuration of a run::

        checkpoint.custom_manager_class = "stager.integrations.megatron_bridge.StagerCheckpointManager"
        checkpoint.async_save = True

    Which state is saved, what is loaded, the trackers and the rotation are Megatron-Bridge's own. stager is configured by
    environment variables and files, as always, or by ``stager_config`` of a class that is derived from this one.

    Args:
        checkpoint_config: Megatron-Bridge's ``CheckpointConfig``.

    Raises:
        ConfigError: ``ckpt_format`` is not ``torch_dist``; or as of :class:`StagerSaveStrategy`.

    Not run: Megatron-Bridge needs CUDA. :class:`StagerSaveStrategy` is run.
    """

    stager_config: ClassVar[Config] = None

    def __init__(self, checkpoint_config: Any) -> None:
        if checkpoint_config.ckpt_format != "torch_dist":
            raise ConfigError(
                f"checkpoint.ckpt_format is {checkpoint_config.ckpt_format}, and stager writes torch_dist; set it to "
                "torch_dist, or take custom_manager_class out"
            )
        from megatron.bridge.training.checkpointing import DefaultCheckpointManager

        self.checkpoint_config = checkpoint_config
        self._default = DefaultCheckpointManager(checkpoint_config)
        self._strategy = StagerSaveStrategy(self.stager_config)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """Megatron-Bridge's strategies; ``save_strategy`` is stager's."""
        context: dict[str, Any] = self._default.checkpointing_context
        return context

    def save(self, ctx: Any, callback_manager: Any = None) -> None:
        """Save as Megatron-Bridge does, with stager's strategy.

        Args:
            ctx: a ``CheckpointSaveContext``.
            callback_manager: in versions of Megatron-Bridge that have one.
        """
        if "save_strategy" not in self.checkpointing_context:
            self.checkpointing_context["save_strategy"] = self._strategy_for(ctx)
        more = {}
        if "callback_manager" in inspect.signature(self._default.save).parameters:
            more["callback_manager"] = callback_manager
        self._default.save(ctx, **more)

    def load(self, ctx: Any) -> tuple[int, int]:
        """Load as Megatron-Bridge does.

        Args:
            ctx: a ``CheckpointLoadContext``.

        Returns:
            The iteration, and the number of floating point operations so far.
        """
        found: tuple[int, int] = self._default.load(ctx)
        return found

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """Finish the saves whose files are there, as Megatron-Bridge does; with ``terminate`` also stop the workers."""
        self._default.finalize_async_saves(state=state, blocking=blocking, terminate=terminate)
        if terminate:
            self._strategy.close()

    def _strategy_for(self, ctx: Any) -> Any:
        if not self.checkpoint_config.fully_parallel_save:
            return self._strategy
        from megatron.bridge.training.utils.pg_utils import get_pg_collection
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        groups = get_pg_collection(ctx.model) if ctx.pg_collection is None else ctx.pg_collection
        constant = self.checkpoint_config.ckpt_assume_constant_structure
        return FullyParallelSaveStrategyWrapper(self._strategy, groups.dp_cp, constant)


def _config(given: StagerConfig) -> StagerConfig:
    for setting, found, wrong in (
        ("persistence.format", given.persistence.format, given.persistence.format != "dcp"),
        ("ranks.together", given.ranks.together, given.ranks.together is True),
        ("arena.when_full", given.arena.when_full, given.arena.when_full == "skip"),
    ):
        if wrong:
            raise ConfigError(
                f"{setting} is {found}; each rank of Megatron saves files of its own, in the format dcp, and none may be "
                "skipped: take it out of stager's configuration"
            )
    return load_config(given, ["ranks.together=false"])


def _plan(planner: Any, state: Any, ranks: _DistWrapper) -> tuple[SavePlan, Metadata | None]:
    """Agree on who saves what. Returns this rank's plan and, on the coordinator, the metadata of all."""
    found: list[Metadata] = []

    def local_step() -> SavePlan:
        planner.set_up_planner(state, is_coordinator=ranks.is_coordinator)
        plan: SavePlan = planner.create_local_plan()
        return plan

    def global_step(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = planner.create_global_plan(plans)
        found.append(metadata)
        return plans

    plan: SavePlan = planner.finish_plan(ranks.reduce_scatter("plan", local_step, global_step))
    return plan, found[0] if found else None


def _value(resolved: Any) -> torch.Tensor:
    """Return a tensor; of an object, the bytes of its ``torch.save`` archive."""
    if isinstance(resolved, io.BytesIO):
        return torch.frombuffer(bytearray(resolved.getvalue()), dtype=torch.uint8)
    tensor: torch.Tensor = resolved.detach()
    return tensor


def _wait(ended: str, trainer: int) -> None:
    """Wait until a save has ended, or the trainer is gone. In a process of Megatron's, or by ``execute_sync()``."""
    while not os.path.exists(ended) and os.path.exists(f"/proc/{trainer}"):
        time.sleep(_POLL_SECS)


def _finish(ranks: _DistWrapper, handle: SaveHandle, plan: SavePlan, metadata: Metadata | None, directory: str) -> None:
    """Write ``.metadata`` when the files of all ranks are there. Called on all ranks.

    Raises:
        CheckpointException: a rank could not write its files; raised on all ranks, with the error of each that failed.
    """

    def places() -> Places:
        return _places(plan, handle.upload_completion.result().path, directory)

    def write(of_ranks: list[Places]) -> None:
        assert metadata is not None  # on the coordinator
        metadata.storage_data = {index: place for of_rank in of_ranks for index, place in of_rank}
        directory_fd = files.open_directory(directory)
        try:
            files.write_atomically(directory_fd, directory, METADATA_NAME, pickle.dumps(metadata), fsync=True)
        finally:
            os.close(directory_fd)

    ranks.all_reduce("write", places, write)


def _places(plan: SavePlan, path: str, directory: str) -> Places:
    """Say where each item of a plan lies: a tensor as a ``torch.save`` archive, an object's archive as raw bytes."""
    manifest = read_manifest(path)
    layout = manifest.layout
    numbers = {str(key): index for (key,), index in manifest.paths()}
    found = []
    for number, item in enumerate(plan.items):
        stored = layout.items[numbers[str(number)]]
        name = os.path.relpath(os.path.join(path, layout.files[stored.file].name), directory)
        is_object = item.type == WriteItemType.BYTE_IO
        offset, nbytes = (stored.data_offset, stored.data_nbytes) if is_object else (stored.offset, stored.nbytes)
        found.append((item.index, _StorageInfo(name, offset, nbytes)))
    return found
