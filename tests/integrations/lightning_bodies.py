"""Trainings in Lightning on several ranks, each rank a process of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

from stager.integrations.lightning import (
    StagerGuard,
    StagerModelCheckpoint,
    StagerModelParallelStrategy,
    StagerRandomState,
)


def _become(rank: int, num_ranks: int) -> None:
    """As torchrun would start this rank; its process group exists already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), NODE_RANK="0")
    torch.use_deterministic_algorithms(True)


def _be_killed_with_the_other(trainer: Any, pl_module: Any, error: BaseException) -> None:
    """Where the other rank was killed, this one fails, and is killed as its launcher would do it."""
    if os.environ.get("STAGER_TEST_IS_KILLED") == "yes":
        os.kill(os.getpid(), signal.SIGKILL)


StagerRandomState.on_exception = staticmethod(_be_killed_with_the_other)


def page(rank: int, directory: str, script: str, out: str, num_ranks: int = 2) -> str:
    """The script of the page."""
    _become(rank, num_ranks)

    names: dict[str, Any] = {"__name__": "train"}
    exec(compile(Path(script).read_text(), script, "exec"), names)
    names["main"](out)
    return "trained"


class Sharded(L.LightningModule):
    """A model of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = torch.nn.Linear(8, 16)
        self.dropout = torch.nn.Dropout(0.3)
        self.second = torch.nn.Linear(16, 4)

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return  # load_from_checkpoint()
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.first, self.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        hidden = self.dropout(self.first(batch[0]))
        return self.second(hidden).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]


def fit_sharded(
    directory: str, num_ranks: int, *, stock: bool = False, max_steps: int = 12, ckpt_path: str | None = "last"
) -> tuple[Any, Sharded]:
    """Train a sharded model. Returns the trainer and the model."""
    L.seed_everything(0)
    data = torch.utils.data.TensorDataset(torch.randn(160, 8, generator=torch.Generator().manual_seed(1)))
    sampler = torch.utils.data.DistributedSampler(data, num_ranks, int(os.environ["RANK"]))
    loader = StatefulDataLoader(data, batch_size=4, sampler=sampler)
    sizes: dict[str, Any] = {"data_parallel_size": num_ranks, "tensor_parallel_size": 1}
    config = {"workers": {"count": 1}, "ranks": {"timeout_secs": 30}}
    strategy = ModelParallelStrategy(**sizes) if stock else StagerModelParallelStrategy(**sizes, config=config)
    callbacks: list[Any] = [
        StagerRandomState(),
        StagerModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=3, save_last="link"),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        plugins=[LightningEnvironment()],
        use_distributed_sampler=False,
        max_steps=max_steps,
        callbacks=callbacks if stock else [StagerGuard(), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Sharded()
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer, model


def made_by(trainer: Any, model: Sharded) -> dict[str, Any]:
    """What this rank has of what a training has made."""
    states = list(trainer.optimizers[0].state.values())
    return {
        "model": [parameter.to_local().detach() for parameter in model.parameters()],
        "optimizer": [value.to_local() for state in states for value in (state["exp_avg"], state["exp_avg_sq"])],
        "random": torch.get_rng_state(),
    }


def sharded(rank: int, directory: str, out: str) -> list[str]:
    """FSDP2; ends with ``final-RANK.pt`` beside the checkpoints."""
    _become(rank, 2)

    trainer, model = fit_sharded(f"{out}/ckpt", 2)
    torch.save(made_by(trainer, model), f"{out}/final-{rank}.pt")
    trainer.strategy.barrier()
    return sorted(name for name in os.listdir(f"{out}/ckpt") if not name.startswith("."))


def stock_goes_on(rank: int, directory: str, out: str, num_ranks: int = 2) -> int:
    """Lightning's own strategy resumes from what stager wrote."""
    _become(rank, num_ranks)
    trainer, _ = fit_sharded(f"{out}/stock", num_ranks, stock=True, max_steps=14, ckpt_path=f"{out}/ckpt/last.ckpt")
    return int(trainer.global_step)


def goes_on_from_stock(rank: int, directory: str, out: str) -> int:
    """stager's strategy resumes from what Lightning's own wrote, and removes it."""
    _become(rank, 2)
    fit_sharded(f"{out}/mixed", 2, stock=True, max_steps=3, ckpt_path=None)
    trainer, _ = fit_sharded(f"{out}/mixed", 2, max_steps=9, ckpt_path=f"{out}/mixed/step=3.ckpt")
    return int(trainer.global_step)


def loads_on_one_rank(rank: int, directory: str, path: str) -> list[Any]:
    """stager's strategy loads on one rank what two have saved. Returns the parameters."""
    _become(rank, 1)
    _, model = fit_sharded(f"{directory}/one", 1, max_steps=9, ckpt_path=path)  # all nine are done
    return [parameter.full_tensor().tolist() for parameter in model.parameters()]  # type: ignore[attr-defined]
