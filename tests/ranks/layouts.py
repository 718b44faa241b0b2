"""One small model and its optimizer, spread over the ranks in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Trained = tuple[nn.Module, torch.optim.Optimizer]


class Model(nn.Module):
    """Lengths that not every number of ranks divides, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(32, 7)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(x)))
        return out


def build(layout: str, seed: int) -> Trained:
    """The model of a seed, and AdamW after one step, so that it has a state."""
    torch.manual_seed(seed)
    model = Model()
    model.seen += seed
    model, wrapped = _SPREAD[layout](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    torch.manual_seed(seed + 1)
    wrapped(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _plain(model: Model) -> tuple[nn.Module, nn.Module]:
    return model, model


def _ddp(model: Model) -> tuple[nn.Module, nn.Module]:
    return model, DistributedDataParallel(model)


def _fsdp(model: Model) -> tuple[nn.Module, nn.Module]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model


_TP_PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def _tp(model: Model) -> tuple[nn.Module, nn.Module]:
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), _TP_PLAN)
    return model, model


def _mesh_2d() -> Any:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))


def _fsdp_tp(model: Model) -> tuple[nn.Module, nn.Module]:
    mesh = _mesh_2d()
    parallelize_module(model, mesh["tp"], _TP_PLAN)
    fully_shard(model, mesh=mesh["dp"])
    return model, model


def _replicated_tp(model: Model) -> tuple[nn.Module, nn.Module]:
    """Tensor parallel in each half of the ranks: what one half holds, the other does, too, on a mesh of its own."""
    parallelize_module(model, _mesh_2d()["tp"], _TP_PLAN)
    return model, model


def _hsdp(model: Model) -> tuple[nn.Module, nn.Module]:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s")))
    return model, model


_SPREAD: dict[str, Callable[[Model], tuple[nn.Module, nn.Module]]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp": _fsdp,
    "tp": _tp,
    "fsdp+tp": _fsdp_tp,
    "replicated tp": _replicated_tp,
    "hsdp": _hsdp,
}
LAYOUTS = tuple(_SPREAD)


def whole(value: Any) -> Any:
    """The same, with full tensors. Collective."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(child) for key, child in value.items()}
    if isinstance(value, list):
        return [whole(child) for child in value]
    return value


def whole_state(trained: Trained) -> dict[str, Any]:
    model, optimizer = trained
    return {"model": dict(whole(dict(model.state_dict()))), "optimizer": whole(optimizer.state_dict())}


def differences(expected: Any, actual: Any, path: str = "state") -> list[str]:
    """Where two states of full tensors are not the same, bit for bit."""
    if isinstance(expected, torch.Tensor):
        same = isinstance(actual, torch.Tensor) and actual.dtype == expected.dtype and torch.equal(actual, expected)
        return [] if same else [path]
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or list(map(str, expected)) != list(map(str, actual)):
            return [f"{path}: other keys"]
        pairs = zip(expected.items(), actual.values(), strict=True)
        return [line for (key, child), other in pairs for line in differences(child, other, f"{path}.{key}")]
    if isinstance(expected, list):
        pairs_ = zip(expected, actual, strict=True)
        return [line for i, (child, other) in enumerate(pairs_) for line in differences(child, other, f"{path}.{i}")]
    return [] if expected == actual else [path]
