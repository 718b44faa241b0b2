"""The training run on several ranks: the demo's GPT, sharded with FSDP2; and one rank's part of any run.

The loop is that of one process (``train.py``): every rank saves and loads with its own ``Checkpointer`` of one directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stager import PerRank
from stager.demo.config import DemoConfig, DemoSettings
from stager.demo.events import SendEvent
from stager.demo.model import GPT
from stager.demo.train import (
    Progress,
    TrainingRun,
    seed_generators,
    train_with_checkpoints,
    train_without_checkpoints,
)


class ShardedRun(TrainingRun):
    """Everything that one rank's part of a training run is made of, and one step of it.

    Each rank takes its part of every batch, so a step means the same on any number of ranks; but each draws its own
    dropout.  Two runs on the same number of ranks are equal bit for bit: Gloo adds up in the same order.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(settings)  # the same weights on all ranks, of which each keeps its part
        seed_generators(settings.seed + 1 + self.rank)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to go on as if nothing had happened.

        The model and the optimizer hold DTensors, of which each rank stores its part.  The scheduler and the loader are
        the same on all ranks and are stored once.
        """
        return super().state | {"rng": PerRank(self.rng)}  # another one on each rank: stored for each

    def save_final(self, path: Path) -> None:
        """Write the whole state at the end of the run with ``torch.save``, for the comparison.  Every rank calls it."""
        final = {name: unsharded(value.state_dict()) for name, value in self.state.items() if name != "rng"}
        own: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(own, self.rng.state_dict())
        if self.rank == 0:
            torch.save(final | {"rng": {f"rank-{rank}": state for rank, state in enumerate(own)}}, path)

    def _placed(self, model: GPT) -> GPT:
        mesh = init_device_mesh("cpu", (self._num_ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def _own_part(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(self.rank, None, self._num_ranks)
        return inputs[own], targets[own]

    def _clip_gradients(self) -> None:
        parameters = list(self.model.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        clip_grads_with_norm_(parameters, 1.0, norm)

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        total = loss.clone()
        dist.all_reduce(total)
        return total / self._num_ranks


def unsharded(value: Any) -> Any:
    """Return a state in which no tensor is sharded.  Every rank has to call it, with the same structure."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: unsharded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unsharded(item) for item in value]
    return value


def train_rank(config: DemoConfig, sharded: bool, directory: Path, checkpoints: str | None, send: SendEvent) -> None:
    """Train this rank's part of a run, from its start or the newest checkpoint to the end.

    Args:
        sharded: the run is sharded over the ranks that torchrun has started, which call this together.
        directory: where rank 0 writes ``losses.jsonl`` and ``final.pt``.
        checkpoints: None: train without.
        send: where this rank reports its progress.
    """
    with _process_group() if sharded else nullcontext():
        run = ShardedRun(config.demo) if sharded else TrainingRun(config.demo)
        path = directory / "losses.jsonl" if run.rank == 0 else os.devnull  # every rank knows the loss
        with open(path, "w", encoding="utf-8") as losses:
            progress = Progress(send, losses)
            if checkpoints is None:
                train_without_checkpoints(config.demo, run, progress)
            else:
                train_with_checkpoints(config, checkpoints, run, progress)
        run.save_final(directory / "final.pt")


@contextmanager
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def leave() -> NoReturn:
    """End this process, whose work is done and which has closed what it had open.

    Python's own way out would end the interpreter while Gloo's threads still release the tensors of the last collective,
    for which they need the interpreter; now and then that is a SIGABRT (pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
