"""Trainings with the Trainer, in the test's process or in ranks of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerControl, TrainerState

from stager.integrations.transformers import stager_trainer
from stager.integrations.transformers_parts.trainer_saves import TrainerSaves

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant_with_warmup",  # does not depend on max_steps
    "warmup_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "log_level": "error",
}


class Scripted(Trainer):
    """A Trainer whose evaluations give the losses that it is told, one after the other."""

    losses: list[float]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.losses.pop(0)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class At(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, call: Any) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            self.call()


class AfterSave(TrainerCallback):
    """Calls a function when the Trainer takes a checkpoint for saved."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.call(state.global_step)


def new_model() -> Any:
    set_seed(0)
    shape = {"vocab_size": 64, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def new_data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (40, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def new_trainer(
    out: Path | str,
    *,
    of: Any = Trainer,
    stock: bool = False,
    losses: list[float] | None = None,
    callbacks: Any = (),
    model: Any = None,
    config: Any = CONFIG,
    on_event: Any = None,
    **arguments: Any,
) -> Any:
    """A Trainer of a tiny GPT-2 with dropout."""
    if losses is not None:
        of = Scripted
        best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
        arguments = {**best, **arguments}
    made = of if stock else stager_trainer(of, config=config, on_event=on_event)
    options = TrainingArguments(str(out), **{**ARGUMENTS, **arguments})
    data = new_data()
    trainer = made(model or new_model(), options, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))
    if losses is not None:
        trainer.losses = list(losses)
    return trainer


def made_by(trainer: Any) -> dict[str, Any]:
    """What a training has made, to the bit."""
    state = trainer.state
    logged = [{k: entry[k] for k in sorted(entry) if not k.endswith(_OF_THE_CLOCK)} for entry in state.log_history]
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "log": [entry for entry in logged if "train_loss" not in entry],
        "flos": state.total_flos,
    }


_OF_THE_CLOCK = ("runtime", "per_second")


def _become(rank: int, num_ranks: int) -> None:
    """As torchrun would start this rank; its process group exists already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, and not used
    torch.set_num_threads(1)


def page(rank: int, directory: str, script: str, out: str, num_ranks: int = 2) -> str:
    """The script of the page. Where another rank was killed, this one is, too, as its launcher would do it."""
    _become(rank, num_ranks)
    if os.environ.get("STAGER_TEST_IS_KILLED") == "yes":
        TrainerSaves.finish_after = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    names: dict[str, Any] = {"__name__": "train"}
    exec(compile(Path(script).read_text(), script, "exec"), names)
    names["main"](out)
    return "trained"
