"""Every kind of tensor that lies on several ranks, and what the ranks of the tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stager import Checkpointer, StagerError
from stager.state.shards import memory_of, views_of
from tests.ranks.bodies import CONFIG
from tests.ranks.wrapped import Wrapped

ROWS = 8
WHOLE = torch.arange(ROWS * 3.0).reshape(ROWS, 3)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _my_rows(num_rows: int = ROWS) -> range:
    per_rank = -(-num_rows // dist.get_world_size())
    return range(num_rows)[dist.get_rank() * per_rank :][:per_rank]


def strided(whole: torch.Tensor) -> DTensor:
    """Of 8 rows on two ranks: 0, 1, 4, 5 and 2, 3, 6, 7."""
    quarters = whole.chunk(2 * dist.get_world_size())
    local = torch.cat(quarters[dist.get_rank() :: dist.get_world_size()])
    return DTensor.from_local(local, _mesh(), [_StridedShard(0, split_factor=2)], shape=whole.shape, stride=(3, 1))


def wrapped(whole: torch.Tensor) -> DTensor:
    """As torchao's float8 weights are under FSDP2."""
    rows = _my_rows()
    return DTensor.from_local(Wrapped(whole[rows.start : rows.stop].clone(), "note"), _mesh(), [Shard(0)])


def sharded(whole: torch.Tensor) -> torch.Tensor:
    """As FSDP1 has it."""
    rows = _my_rows()
    local = whole[rows.start : rows.stop].clone()
    shard = sharded_tensor.Shard.from_tensor_and_offsets(local, [rows.start, 0], dist.get_rank())
    tensor: torch.Tensor = sharded_tensor.init_from_local_shards([shard], *whole.shape)
    return tensor


def marked(whole: torch.Tensor) -> torch.Tensor:
    """By the protocol CheckpointableTensor: this rank's rows in two boxes, in another order, between rows of padding."""
    rows = _my_rows()
    middle = (rows.start + rows.stop) // 2
    boxes = [range(middle, rows.stop), range(rows.start, middle)]
    parts: list[torch.Tensor] = [torch.full((1, 3), -1.0)]
    at, local = 1, []
    for box in boxes:
        local.append((at, 0))
        parts += [whole[box.start : box.stop], torch.full((1, 3), -1.0)]
        at += len(box) + 1
    return mark(
        torch.cat(parts), whole.shape, [(box.start, 0) for box in boxes], local, [(len(box), 3) for box in boxes]
    )


def mark(tensor: Any, shape: Any, offsets: Any, local: Any, sizes: Any) -> Any:
    tensor.global_shape, tensor.global_offsets = tuple(shape), tuple(offsets)
    tensor.local_offsets, tensor.local_sizes = tuple(local), tuple(sizes)
    return tensor


def half(whole: torch.Tensor) -> torch.Tensor:
    """A plain tensor with the rows of this rank."""
    rows = _my_rows()
    return mark(
        whole[rows.start : rows.stop].clone(), whole.shape, [(rows.start, 0)], [(0, 0)], [(len(rows), whole.shape[1])]
    )


def everywhere(whole: torch.Tensor) -> torch.Tensor:
    """All of it on every rank, and said so."""
    return mark(whole.clone(), whole.shape, [(0, 0)], [(0, 0)], [tuple(whole.shape)])


def replicated_wrapper(whole: torch.Tensor) -> DTensor:
    return DTensor.from_local(Wrapped(whole.clone(), "note"), _mesh(), [Replicate()])


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strided": strided,
    "wrapped": wrapped,
    "replicated wrapper": replicated_wrapper,
    "sharded": sharded,
    "marked": marked,
    "half": half,
    "everywhere": everywhere,
}


def module_of(whole: torch.Tensor) -> nn.Module:
    """Its weight is a plain parameter with the rows of this rank; ``state_dict()`` does not keep its attributes."""
    module = nn.Linear(3, len(_my_rows()), bias=False)
    part = half(whole)
    module.weight = nn.Parameter(part.detach().clone())
    rows = _my_rows()
    mark(module.weight, whole.shape, [(rows.start, 0)], [(0, 0)], [(len(rows), 3)])
    return module


def state_of(whole: torch.Tensor) -> dict[str, Any]:
    return {name: make(whole) for name, make in KINDS.items()} | {"module": module_of(whole), "step": 3}


def save_kinds(rank: int, directory: str) -> None:
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, state_of(WHOLE)).upload_completion.result(60)
        ckpt.save(2, state_of(WHOLE + 100)).upload_completion.result(60)


def load_kinds(rank: int, directory: str) -> list[str]:
    """Which kinds do not have the values of step 2."""
    expected, state = state_of(WHOLE + 100), state_of(torch.zeros(ROWS, 3))
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.load(2, into=state)
    wrong = [name for name in KINDS if not _is_equal(state[name], expected[name])]
    if not torch.equal(state["module"].weight, expected["module"].weight):
        wrong.append("module")
    return wrong


def save_and_load_kinds(rank: int, directory: str) -> list[str]:
    save_kinds(rank, directory)
    dist.barrier()
    return load_kinds(rank, directory)


def _is_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    views = zip(views_of(actual), views_of(expected), strict=True)
    return all(torch.equal(one, other) for one, other in views)


def refuse_kinds(rank: int, directory: str) -> dict[str, str]:
    """What cannot be stored is named."""
    bad = {
        "two parts": DTensor.from_local(Wrapped(torch.ones(2, 3), "note", torch.ones(2, 3)), _mesh(), [Shard(0)]),
        "does not fit": mark(torch.ones(2, 3), (4, 3), [(3, 0)], [(0, 0)], [(2, 3)]),
        "overlap": mark(torch.full((3, 3), 1.0), (4, 3), [(rank, 0)], [(0, 0)], [(3, 3)]),
    }
    said = {}
    for step, (name, tensor) in enumerate(bad.items()):
        with Checkpointer(Path(directory, f"run-{step}"), CONFIG) as ckpt:
            try:
                ckpt.save(step, {"model": {name: tensor}}).upload_completion.result(60)
                said[name] = "saved"
            except StagerError as error:
                said[name] = f"{type(error).__name__}: {error}"
    return said


def guarded(rank: int, directory: str) -> list[str]:
    """Which kinds of parameters do not have the values of their step, when the next step follows the save at once."""
    makes = {"strided": strided, "wrapped": wrapped, "half": half}
    wrong = []
    parameters = {name: make(WHOLE) for name, make in makes.items()}
    optimizer = _AddsOne([{"params": [tensor]} for tensor in parameters.values()])
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.guard(optimizer)
        for step in range(1, 4):
            handle = ckpt.save(step, parameters)
            optimizer.step()
            handle.upload_completion.result(60)
        for step in range(1, 4):
            state = {name: make(torch.zeros(ROWS, 3)) for name, make in makes.items()}
            ckpt.load(step, into=state)
            wrong += [name for name, make in makes.items() if not _is_equal(state[name], make(WHOLE + step - 1))]
        split = ckpt._run.saver._taker._split
        assert split is not None and split.later.copies and not split.now.copies, split
    return wrong


class _AddsOne(torch.optim.Optimizer):
    """Changes its parameters in place, whatever they are made of."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                for memory in memory_of(tensor):
                    memory.add_(1)
