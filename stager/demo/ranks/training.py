"""The training run on several ranks: the demo's GPT, sharded with FSDP2.

The loop is that of one process (``stager/demo/train.py``): every rank saves and loads with its own ``Checkpointer`` of
one directory, and nothing in it asks how many ranks there are.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stager import PerRank
from stager.demo.events import EventSink
from stager.demo.ranks.config import RanksConfig, RanksSettings
from stager.demo.rng import RngState
from stager.demo.text import TextBatches, read_corpus
from stager.demo.train import (
    Progress,
    make_model,
    make_optimizer,
    make_scheduler,
    train_with_checkpoints,
    train_without_checkpoints,
)


class ShardedRun:
    """Everything that one rank's part of a training run is made of, and one step of it.

    Each rank takes its part of every batch, so a step means the same on any number of ranks; but each draws its own
    dropout.  Two runs on the same number of ranks are equal bit for bit: Gloo adds up in the same order.
    """

    def __init__(self, settings: RanksSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(settings.seed)  # the same weights on all ranks, of which each keeps its part
        self.model = make_model(settings)
        mesh = init_device_mesh("cpu", (self._num_ranks,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = make_optimizer(self.model, settings)
        self.scheduler = make_scheduler(self.optimizer, settings)
        self.loader = TextBatches(read_corpus(), settings.batch_size, settings.block_size, settings.seed)
        random.seed(settings.seed + self._rank)
        torch.manual_seed(settings.seed + 1 + self._rank)  # other dropout on each
        self.rng = RngState()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to go on as if nothing had happened."""
        return {
            "model": self.model,  # DTensors: each rank stores its part
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,  # the same on all ranks: stored once
            "loader": self.loader,
            "rng": PerRank(self.rng),  # another one on each rank: stored for each
        }

    def train_step(self) -> float:
        """One optimizer step on this rank's part of the next batch; returns the loss of the whole batch."""
        if self.scheduler.last_epoch >= self._settings.dropout_steps:
            self.model.eval()  # no more dropout
        inputs, targets = next(self.loader)
        mine = slice(self._rank, None, self._num_ranks)
        loss: torch.Tensor = self.model(inputs[mine], targets[mine])
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return (total / self._num_ranks).item()

    def _clip_gradients(self) -> None:
        parameters = list(self.model.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        clip_grads_with_norm_(parameters, 1.0, norm)

    def save_final(self, path: Path) -> None:
        """Write the whole state at the end of the run with ``torch.save``, for the comparison.  Every rank calls it."""
        final = {name: whole(value.state_dict()) for name, value in self.state.items() if name != "rng"}
        own: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(own, self.rng.state_dict())
        if self._rank == 0:
            torch.save(final | {"rng": {f"rank-{rank}": state for rank, state in enumerate(own)}}, path)


def whole(value: Any) -> Any:
    """A state in which no tensor is sharded.  Every rank has to call it, with the same structure."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def train_rank(config: RanksConfig, directory: Path, checkpoints: Path | None, events: EventSink) -> None:
    """This rank's part of a training run, from its start or the newest checkpoint to the end.

    Args:
        directory: where rank 0 writes ``losses.jsonl`` and ``final.pt``.
        checkpoints: None: train without.
        events: where this rank says how it goes.
    """
    run = ShardedRun(config.demo_ranks)
    kept = directory / "losses.jsonl" if dist.get_rank() == 0 else os.devnull  # every rank knows the loss
    with open(kept, "w", encoding="utf-8") as losses:
        progress = Progress(events, losses)
        if checkpoints is None:
            train_without_checkpoints(config.demo_ranks, run, progress)
        else:
            train_with_checkpoints(config, checkpoints, run, progress)
    run.save_final(directory / "final.pt")


def leave() -> NoReturn:
    """End this process, whose work is done and which has closed what it had open.

    Not by Python's own way: it would end the interpreter while Gloo's threads still let go of the tensors of the last
    collective, for which they need the interpreter, and now and then that is a SIGABRT (pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
