"""Checkpoints of Megatron-Core, in ranks of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from stager import ConfigError, verify
from tests.faults import faults_of_this_process

sys.modules["wandb"] = None  # type: ignore[assignment]  # megatron.core imports it, and it leaves temporary directories

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from stager.integrations.megatron_bridge import StagerCheckpointManager, StagerSaveStrategy

del sys.modules["wandb"]

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}
ROWS = 4  # of each of two shards


def state_of(rank: int, num_ranks: int, scale: float = 1.0) -> dict[str, Any]:
    """A state as Megatron makes it: tensors that are sharded or the same on all ranks, objects of ranks, plain values."""
    rows = 2 * ROWS // num_ranks
    first = rank * rows
    sharded = (torch.arange(2.0 * ROWS * 3).reshape(-1, 3) * scale)[first : first + rows].contiguous()
    return {
        "model": {
            "sharded": ShardedTensor.from_rank_offsets("model.sharded", sharded, (0, rank, num_ranks)),
            "same": ShardedTensor.from_rank_offsets("model.same", torch.arange(5.0) * scale, replica_id=rank),
            "scalar": ShardedTensor.from_rank_offsets("model.scalar", torch.tensor(scale), replica_id=rank),
        },
        "rng": ShardedObject("rng", {"of": "rank 0", "scale": scale}, (1,), (0,), replica_id=rank),
        "iteration": 7,
    }


def values(state: Any) -> Any:
    """What a loaded state has, as JSON has it."""
    if isinstance(state, dict):
        return {str(key): values(value) for key, value in state.items() if key != "content_metadata"}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def loaded(rank: int, num_ranks: int, path: str) -> Any:
    """What Megatron's own strategy reads."""
    return values(dist_checkpointing.load(state_of(rank, num_ranks, scale=0.0), path))


def saved(rank: int, directory: str, path: str, num_ranks: int, fully_parallel: bool) -> Any:
    """Save with stager; change the tensors while it is written; load with Megatron."""
    strategy = StagerSaveStrategy(CONFIG)
    Path(path).mkdir(exist_ok=True)
    dist.barrier()
    state = state_of(rank, num_ranks)
    wrapped = FullyParallelSaveStrategyWrapper(strategy, dist.group.WORLD) if fully_parallel else strategy
    request = dist_checkpointing.save(state, path, wrapped, async_sharded_save=True)
    for part in state["model"].values():
        part.data.fill_(-1)
    assert not Path(path, "metadata.json").exists() and not Path(path, ".metadata").exists()
    request.execute_sync()
    assert verify(Path(path, f"rank-{rank:05d}", "shards")).ok
    strategy.close()
    return loaded(rank, num_ranks, path)


def loaded_alone(rank: int, directory: str, path: str) -> Any:
    return loaded(0, 1, path)


def saved_twice(rank: int, directory: str, path: str) -> Any:
    """A directory that an earlier save has left is written anew."""
    Path(path).mkdir(exist_ok=True)
    strategy = StagerSaveStrategy(CONFIG)
    for scale in (3.0, 1.0):
        dist_checkpointing.save(state_of(0, 1, scale), path, strategy)
    strategy.close()
    return loaded(0, 1, path)


def failed(rank: int, directory: str, path: str) -> list[Any]:
    """Rank 1 cannot write: every rank hears of it, and nothing names the checkpoint."""
    faults = faults_of_this_process(Path(directory, f"faults-{rank}"))
    if rank == 1:
        faults.arm("part.write", "errno ENOSPC")
    Path(path).mkdir(exist_ok=True)
    dist.barrier()
    strategy = StagerSaveStrategy(CONFIG)
    request = dist_checkpointing.save(state_of(rank, 2), path, strategy, async_sharded_save=True)
    said = "nothing"
    try:
        request.execute_sync()
    except CheckpointException as error:
        said = str({rank: type(failure[0]).__name__ for rank, failure in error.failures.items()})
    strategy.close()
    return [said, Path(path, ".metadata").exists(), Path(path, "metadata.json").exists()]


def refused(rank: int, directory: str) -> list[str]:
    """Configurations that cannot be meant."""
    said = []
    for config in (
        {"persistence": {"format": "torch"}},
        {"ranks": {"together": True}},
        {"arena": {"when_full": "skip"}},
    ):
        try:
            StagerSaveStrategy(config)
        except ConfigError as error:
            said.append(str(error))
    try:
        StagerCheckpointManager(Config(ckpt_format="fsdp_dtensor"))
    except ConfigError as error:
        said.append(str(error))
    return said


# -- Megatron-Bridge's manager, with a double of what is around it --------------------------------------------------------


@dataclass
class Config:
    ckpt_format: str = "torch_dist"
    fully_parallel_save: bool = True
    ckpt_assume_constant_structure: bool = False
    async_save: bool = True


class Bridge:
    """A double of ``megatron.bridge.training.checkpointing.DefaultCheckpointManager`` (0.6).

    It takes the strategy from the context, as Megatron-Bridge does, and puts the request into a queue.
    """

    def __init__(self, checkpoint_config: Config) -> None:
        self.checkpoint_config = checkpoint_config
        self.checkpointing_context: dict[str, Any] = {}

    def save(self, ctx: Any, callback_manager: Any) -> None:
        request = dist_checkpointing.save(
            ctx.state.content,
            ctx.state.path,
            self.checkpointing_context["save_strategy"],
            async_sharded_save=self.checkpoint_config.async_save,
        )
        request.add_finalize_fn(lambda: Path(ctx.state.path, "../latest").write_text(Path(ctx.state.path).name))
        ctx.state.queue.append((request, callback_manager))

    def load(self, ctx: Any) -> tuple[int, int]:
        ctx.state.content = dist_checkpointing.load(ctx.state.content, ctx.state.path)
        return ctx.state.content["iteration"], 0

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        while blocking and state.queue:
            state.queue.pop(0)[0].execute_sync()


def managed(rank: int, directory: str, path: str) -> Any:
    """Save and load by the manager, as Megatron-Bridge's training loop calls it."""
    os.environ["STAGER_WORKERS__COUNT"] = "1"
    groups = SimpleNamespace(dp_cp=dist.group.WORLD)
    names = ("megatron.bridge", "megatron.bridge.training", "megatron.bridge.training.utils")
    for name in (*names, "megatron.bridge.training.checkpointing", "megatron.bridge.training.utils.pg_utils"):
        sys.modules[name] = ModuleType(name)
    sys.modules["megatron.bridge.training.checkpointing"].DefaultCheckpointManager = Bridge  # type: ignore[attr-defined]
    sys.modules["megatron.bridge.training.utils.pg_utils"].get_pg_collection = lambda _: groups  # type: ignore[attr-defined]
    Path(path).mkdir(exist_ok=True)
    dist.barrier()
    manager = StagerCheckpointManager(Config())
    state = SimpleNamespace(content=state_of(rank, 2), path=path, queue=[])
    manager.save(SimpleNamespace(state=state, model=[], pg_collection=None), "callbacks")
    assert [given for _, given in state.queue] == ["callbacks"]
    manager.finalize_async_saves(state, blocking=False)
    seen = Path(path, "../latest").exists()
    manager.finalize_async_saves(state=state, blocking=True, terminate=True)
    latest = Path(path, "../latest").read_text()
    state.content = state_of(rank, 2, scale=0.0)
    assert manager.load(SimpleNamespace(state=state)) == (7, 0)
    return [seen, latest, values(state.content)]
