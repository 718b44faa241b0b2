"""Trainings with Accelerate, in the test's process or in ranks of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, gather_object, set_seed
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from stager.integrations.accelerate import AcceleratorCheckpointer

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}
PER_EPOCH = 5  # batches of one process


class Registered:
    """An object for ``register_for_checkpointing()``."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def reset() -> None:
    """Forget the Accelerator of this process, whose state is shared by all that are made."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A small training: ``step()`` takes one batch. Each is made like any other, whatever was drawn before.

    Args:
        out: the project's directory; None: checkpoints are named by hand.
        stateful: the data loader knows its position.
        total_limit, iteration: as of ProjectConfiguration.
    """

    def __init__(self, out: Path | str | None, *, stateful: bool = True, seed: int = 0, **project: Any) -> None:
        set_seed(seed)
        self.accelerator = Accelerator(
            cpu=True,
            project_config=ProjectConfiguration(
                None if out is None else str(out), automatic_checkpoint_naming=out is not None, **project
            ),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=stateful),
        )
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        length = 4 * PER_EPOCH * self.accelerator.num_processes
        rows = torch.arange(4.0 * length).reshape(length, 4) / length
        loader = DataLoader(TensorDataset(rows), batch_size=4, shuffle=True, generator=torch.Generator())
        prepared = self.accelerator.prepare(model, optimizer, scheduler, loader)
        self.model, self.optimizer, self.scheduler, self.loader = prepared
        self.registered = Registered()
        self.accelerator.register_for_checkpointing(self.registered)
        self._batches = iter(())

    def batch(self) -> torch.Tensor:
        """The next batch, of the next epoch if need be."""
        for (rows,) in self._batches:
            return rows
        self._batches = iter(self.loader)
        return next(self._batches)[0]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.accelerator.backward(self.model(self.batch()).square().mean())
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.registered.value += 1

    def made(self) -> dict[str, Any]:
        """What it has made so far, and the numbers that it draws next."""
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "registered": self.registered.value,
            "random": [torch.rand(3), random.random()],
        }


def _join(rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)


def saved_by_ranks(rank: int, directory: str, out: str) -> list[float]:
    """Save under DDP, draw a number, change all, load, and draw it again. Returns both numbers, and where rows begin."""
    _join(rank)
    training = Training(out)
    torch.manual_seed(100 + rank)  # each has its own random numbers
    with AcceleratorCheckpointer(training.accelerator, CONFIG) as checkpointer:
        training.step(3)
        checkpointer.save_state()
        drawn, row = torch.rand(()).item(), training.batch()[0, 0].item()
        training.step(2)
        assert checkpointer.load_state() is not None
        again = torch.rand(()).item()
        training._batches = iter(training.loader)
        assert training.accelerator.save_iteration == 1 and training.registered.value == 3
        assert gather_object([rank]) == [0, 1]
        return [drawn, again, row, training.batch()[0, 0].item()]


def sharded_by_ranks(rank: int, directory: str, out: str) -> int:
    """Save a model of ``fully_shard()`` as Accelerate would hold it, and what it is as a whole."""
    _join(rank)
    training = Training(out)
    accelerator = training.accelerator
    set_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator._models, accelerator._optimizers = [model], [AcceleratedOptimizer(optimizer, device_placement=False)]
    accelerator._schedulers = []
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with AcceleratorCheckpointer(accelerator, CONFIG) as checkpointer:
        checkpointer.save_state()
    whole = {
        "model": {name: value.full_tensor() for name, value in model.state_dict().items()},
        "moments": [
            optimizer.state[parameter]["exp_avg"].full_tensor()
            for group in optimizer.param_groups
            for parameter in group["params"]
        ],
    }
    if rank == 0:
        torch.save(whole, f"{out}/whole.pt")
    return rank


def page(rank: int, directory: str, script: str, out: str) -> str:
    """Run the script of the page as one rank."""
    _join(rank)
    PartialState.destroy_process_group = lambda *_: None  # run_ranks() destroys it
    names: dict[str, Any] = {"__name__": "train"}
    exec(compile(Path(script).read_text(), script, "exec"), names)
    try:
        names["main"](out)
    except Exception:
        if os.environ.get("STAGER_TEST_IS_KILLED") == "yes":  # where the other rank was, its launcher kills this one
            os.kill(os.getpid(), signal.SIGKILL)
        raise
    return "trained"
