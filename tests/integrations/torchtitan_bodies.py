"""Trainings with torchtitan's containers, in the test's process or in ranks of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

from tests.integrations import torchtitan_on_cpu  # isort: skip  # before torchtitan

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from stager import CorruptCheckpointError
from stager.integrations import torchtitan
from stager.integrations.torchtitan import StagerCheckpointManager
from stager.workers.checkpoint.storage.posix import files
from tests.replication.bodies import await_replicas

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}


class Adapter(BaseStateDictAdapter):
    """Names and shapes of Hugging Face: weights are transposed there, and have a prefix."""

    fqn_to_index_mapping = None

    def __init__(self, hf_assets_path: str | None = None) -> None:
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            f"model.{name}": value.t().contiguous() if value.ndim == 2 else value for name, value in state_dict.items()
        }

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            name.removeprefix("model."): value.t() if value.ndim == 2 else value
            for name, value in hf_state_dict.items()
        }

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(path)


class Progress:
    """What the Trainer is among the states: ``train_state``."""

    def __init__(self) -> None:
        self.step, self.ntokens_seen = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


class Position:
    """A data loader, with the keys of torchtitan's: each rank has one of its own."""

    def __init__(self, rank: int = 0) -> None:
        self._key, self.num_batches = f"dp_rank_{rank}", 0

    def state_dict(self) -> dict[str, int]:
        return {self._key: self.num_batches, "world_size": 1}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_batches = state[self._key]


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def toy(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))


class Training:
    """A small training with torchtitan's containers. ``step()`` does what ``Trainer.train()`` does in one step.

    Args:
        out: torchtitan's ``dump_folder``.
        manager: stager's or torchtitan's own.
        parts: the model's, as pipeline parallelism has several; None: one toy.
        settings: of the manager's Config.
    """

    def __init__(
        self,
        out: Path | str,
        manager: type[Any] = StagerCheckpointManager,
        *,
        seed: int = 0,
        parts: Sequence[torch.nn.Module] | None = None,
        adapter: Adapter | None = None,
        rank: int = 0,
        **settings: Any,
    ) -> None:
        self.parts = [toy(seed)] if parts is None else list(parts)
        adamw = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2})
        self.optimizers = OptimizersContainer.Config(param_groups=[adamw], implementation="for-loop").build(
            model_parts=self.parts
        )
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=20
        )
        self.progress, self.position = Progress(), Position(rank)
        given = {"enable": True, "interval": 2, "keep_latest_k": 0, "last_save_model_only": False}
        if issubclass(manager, StagerCheckpointManager):
            given["stager_settings"] = CONFIG
        self.manager: Any = manager.Config(**{**given, **settings}).build(
            dataloader=self.position,
            model_parts=self.parts,
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.progress},
            sd_adapter=adapter,
            base_folder=str(out),
        )
        torch.manual_seed(100 + seed)

    def step(self, count: int = 1, *, last: bool = False) -> None:
        """Train some steps, and let the manager save; ``last``: the training ends with them."""
        for number in range(count):
            self.progress.step += 1
            self.progress.ntokens_seen += 4
            self.position.num_batches += 1
            self.optimizers.zero_grad()
            rows = torch.randn(3, 4)
            for part in self.parts:
                rows = part(rows)
            rows.square().mean().backward()
            self.manager.maybe_wait_for_staging()
            self.optimizers.step()
            self.schedulers.step()
            self.manager.save(self.progress.step, last_step=last and number == count - 1)

    def made(self, *, with_random: bool = True) -> list[Any]:
        """What it has made so far, and the numbers that it draws next."""
        return [
            {name: value.clone() for part in self.parts for name, value in part.state_dict().items()},
            {
                name: value
                for name, value in self.optimizers.state_dict().items()
                if not name.startswith("param_groups")
            },
            self.schedulers.state_dict(),
            self.progress.state_dict(),
            self.position.num_batches,
            torch.rand(3) if with_random else None,
        ]

    def close(self) -> None:
        self.manager.maybe_wait_for_saving()
        self.manager.close()


def export(out: str, group: str, exchanges: str) -> None:
    """In a process of its own: go back to step 2, and end at step 4 with an export.

    Args:
        group: a file for the process group.
        exchanges: "False": on a file system that cannot exchange two names.
    """
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=0, world_size=1)
    torch.set_num_threads(1)
    if exchanges == "False":
        files.exchange = lambda first, second: False  # type: ignore[assignment]
    training = Training(out, adapter=Adapter(), last_save_in_hf=True, last_save_model_only=True)
    training.manager.load(2)
    training.step(2, last=True)
    training.close()
    dist.destroy_process_group()


# -- ranks ------------------------------------------------------------------------------------------------------------


class Named(torch.nn.Module):
    """A stage of a pipeline: a layer with a name that no other stage has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, torch.nn.Linear(4, 4))
        self._name = name

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self._name)(rows)  # type: ignore[no-any-return]


def stages(rank: int, directory: str, out: str, writer: str) -> list[Any]:
    """Save, as a stage of a pipeline that has other names than the other rank; load by either manager; compare."""
    managers = {"stager": StagerCheckpointManager, "torchtitan": CheckpointManager}
    writes, reads = managers[writer], next(one for name, one in managers.items() if name != writer)
    made: list[Any] = []
    for manager, seed in ((writes, 0), (writes, 1), (reads, 1)):
        torch.manual_seed(seed)
        training = Training(out, manager, seed=seed, parts=[Named(f"a{rank}"), Named(f"b{rank}")], rank=rank)
        if not made:
            training.step(2)
            made = training.made(with_random=False)
        else:
            assert training.manager.load()
            from tests.states import same

            assert same(training.made(with_random=False), made), manager
        training.close()
        dist.barrier()
    return sorted(made[0])


def damaged_stage(rank: int, directory: str, out: str, writer: str) -> list[int]:
    """Load where rank 1 alone finds that the newest checkpoint is damaged. Returns the steps gone on from."""

    def training(manager: type[Any], seed: int, **settings: Any) -> Training:
        torch.manual_seed(seed)
        parts = [Named(f"a{rank}"), Named(f"b{rank}")]
        return Training(out, manager, seed=seed, parts=parts, rank=rank, **settings)

    first = training(CheckpointManager if writer == "torchtitan" else StagerCheckpointManager, 0)
    first.step(4)
    first.close()
    dist.barrier()
    if rank == 1 and writer == "stager":
        flip(Path(out, "checkpoint/step-4/__1_0.distcp"))
    if rank == 1 and writer == "torchtitan":  # there are no hashes, and each rank sees the sizes
        _refuse_to_load("step-4")
    dist.barrier()
    found = []
    for load_only in (True, False):
        again = training(StagerCheckpointManager, 1, load_only=load_only)
        assert again.manager.load()
        found.append(again.progress.step)
        again.close()
        dist.barrier()
    return found


def _refuse_to_load(name: str) -> None:
    """Find a checkpoint damaged after its names were compared with those of the other ranks."""
    load = torchtitan.load_checkpoint

    def refuse(path: str, *arguments: Any, **options: Any) -> Any:
        loaded = load(path, *arguments, **options)
        if os.path.basename(path) == name:
            raise CorruptCheckpointError(path, "is damaged")
        return loaded

    torchtitan.load_checkpoint = refuse


def replicated(rank: int, directory: str, out: str, how: str) -> int:
    """Load the newest checkpoint after it was damaged, where a replica of it is in memory. Returns its step.

    Args:
        how: the damage is found by what is listed, or by what is read.
    """
    memory = Path(directory, "memory")
    memory.mkdir(exist_ok=True)
    settings = {**CONFIG, "replication": {"partners": 1, "directory": str(memory)}}
    training = Training(out, parts=[Named(f"a{rank}")], rank=rank, stager_settings=settings)
    training.step(4)
    handles = list(training.manager._handles)
    training.manager.maybe_wait_for_saving()
    for handle in handles:
        await_replicas(training.manager.checkpointer, handle)
    dist.barrier()
    path = Path(out, "checkpoint/step-4/__1_0.distcp")
    if rank == 1:
        os.truncate(path, 100) if how == "truncated" else flip(path)
    dist.barrier()
    assert training.manager.load()
    step = training.progress.step
    dist.barrier()
    training.close()
    return step


def page(rank: int, directory: str, script: str, out: str) -> str:
    """Run the script of the page as one rank."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    torchtitan_on_cpu.prepare()
    source = Path(script).read_text().replace("dist.destroy_process_group()", "pass")  # run_ranks() destroys it
    names: dict[str, Any] = {"__name__": "train"}
    exec(compile(source, script, "exec"), names)
    try:
        names["main"](out)
    except Exception:
        if os.environ.get("STAGER_TEST_IS_KILLED") == "yes":  # where the other rank was, its launcher kills this one
            os.kill(os.getpid(), signal.SIGKILL)
        raise
    return "trained"
