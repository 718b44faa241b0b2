"""FSDP1 (``FullyShardedDataParallel``): what the ranks of the tests do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from stager import Checkpointer, StagerError
from tests.ranks.bodies import CONFIG


def _train(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    torch.manual_seed(seed + 1)
    wrapped(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return wrapped, optimizer


def _by_shards(model: Any) -> Any:
    """``state_dict()`` gives ShardedTensors."""
    kind = StateDictType.SHARDED_STATE_DICT
    settings = ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    return FullyShardedDataParallel.state_dict_type(model, kind, *settings)


def _whole(value: Any) -> Any:
    """Full tensors instead of ShardedTensors. Collective."""
    if isinstance(value, dict):
        return {key: _whole(child) for key, child in value.items()}
    if hasattr(value, "local_shards"):
        full = torch.zeros(value.shape) if dist.get_rank() == 0 else None
        value.gather(0, full)
        return full
    return value


def _state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer)}


def save(rank: int, directory: str) -> None:
    model, optimizer = _train(3)
    with _by_shards(model):
        state = _state(model, optimizer)
        with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
            ckpt.save(1, state).upload_completion.result(60)
        whole = _whole(state)
    if rank == 0:
        torch.save(whole, Path(directory, "expected.pt"))


def load(rank: int, directory: str) -> list[str]:
    """Names of what is not as it was saved."""
    model, optimizer = _train(11)
    with _by_shards(model):
        state = _state(model, optimizer)
        with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
            ckpt.load(into=state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state["optimizer"])
        )
        whole = _whole(_state(model, optimizer))
    return different(torch.load(Path(directory, "expected.pt")), whole) if rank == 0 else []


def load_module(rank: int, directory: str) -> list[str]:
    """The module itself, and a plain dict whose order is another one on each rank: both load by collectives."""
    model, _ = _train(11)
    other, _ = _train(12)
    names = ["model", "other"][:: 1 - 2 * rank]
    state = {name: {"model": model, "other": other}[name] for name in names}
    with _by_shards(model), _by_shards(other):
        with Checkpointer(Path(directory, "modules"), CONFIG) as ckpt:
            source, second = _train(3)[0], _train(4)[0]
            with _by_shards(source), _by_shards(second):
                ckpt.save(1, {"model": source, "other": second}).upload_completion.result(60)
                expected = _whole({"model": source.state_dict(), "other": second.state_dict()})
            ckpt.load(into=state)
        actual = _whole({"model": model.state_dict(), "other": other.state_dict()})
    return different(expected, actual) if rank == 0 else []


def save_and_load(rank: int, directory: str) -> list[str]:
    save(rank, directory)
    dist.barrier()
    return load(rank, directory) + load_module(rank, directory)


def different(expected: Any, actual: Any, path: str = "state") -> list[str]:
    if isinstance(expected, dict):
        return [line for key in expected for line in different(expected[key], actual[key], f"{path}.{key}")]
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, actual) else [path]
    return [] if expected == actual else [path]


def save_plain_optimizer(rank: int, directory: str) -> str:
    """Flat parameters, and the optimizer object itself: each rank has other moments under the same name."""
    torch.manual_seed(3)
    model = FullyShardedDataParallel(nn.Linear(6, 4), device_id=torch.device("cpu"), use_orig_params=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        try:
            ckpt.save(1, {"optimizer": optimizer}).upload_completion.result(60)
        except StagerError as error:
            return f"{type(error).__name__}: {error}"
    return "saved"
