"""The training child: trains the GPT, with checkpoints or without.

:func:`train_with_checkpoints` is the loop to copy.  Run as
``python -m stager.demo.train --config FILE --run-dir DIR --events-fd FD [--checkpoints DIR]``.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from stager import Checkpointer, CheckpointInfo, SaveHandle
from stager.demo.config import DemoConfig, DemoSettings, TrainingConfig, TrainingSettings
from stager.demo.events import (
    EventSink,
    EventWriter,
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveReturned,
    SaveStaged,
    StepDone,
    write_loss,
)
from stager.demo.model import GPT
from stager.demo.rng import RngState
from stager.demo.text import VOCABULARY_SIZE, TextBatches, read_corpus


class Run(Protocol):
    """What the training loops need of a run."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose ``step()`` alone changes the weights."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to go on as if nothing had happened."""

    def train_step(self) -> float:
        """One optimizer step on the next batch; returns the loss, in nats per byte."""


class TrainingRun:
    """Everything a training run is made of, and one step of it.

    On a CPU every operation used here gives the same bits in every run that uses the same number of threads, so two
    runs of one configuration are equal bit for bit.
    """

    def __init__(self, settings: DemoSettings) -> None:
        torch.set_num_threads(settings.threads)
        random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        self.model = make_model(settings)
        self.optimizer = make_optimizer(self.model, settings)
        self.scheduler = make_scheduler(self.optimizer, settings)
        self.loader = TextBatches(read_corpus(), settings.batch_size, settings.block_size, settings.seed)
        self.rng = RngState()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to go on as if nothing had happened."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "rng": self.rng,
        }

    def train_step(self) -> float:
        """One optimizer step on the next batch; returns the loss, in nats per byte."""
        inputs, targets = next(self.loader)
        loss: torch.Tensor = self.model(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return loss.item()

    def save_final(self, path: Path) -> None:
        """Write the state at the end of the run with ``torch.save``, for the comparison."""
        torch.save({name: value.state_dict() for name, value in self.state.items()}, path)


def make_model(settings: TrainingSettings) -> GPT:
    """The GPT; its weights are drawn from torch's generator."""
    return GPT(
        vocabulary_size=VOCABULARY_SIZE,
        block_size=settings.block_size,
        num_layers=settings.n_layer,
        num_heads=settings.n_head,
        width=settings.n_embd,
        dropout=settings.dropout,
    )


def make_optimizer(model: torch.nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, settings.warmup_steps, settings.steps)
    )


def lr_factor(step: int, warmup_steps: int, steps: int) -> float:
    """The learning rate at ``step``, as a share of the highest: a linear rise, then half a cosine down to a tenth."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Progress:
    """Tells the parent how the run goes, and keeps each step's exact loss in a file."""

    def __init__(self, events: EventSink, losses: IO[str]) -> None:
        self._events = events
        self._losses = losses

    def resumed(self, step: int, skipped: Sequence[str]) -> None:
        self._events.send(Resumed(step, tuple(skipped)))

    def step_done(self, step: int, loss: float) -> None:
        write_loss(self._losses, step, loss)
        self._events.send(StepDone(step, loss, time.time()))

    def save_begins(self, step: int) -> None:
        self._events.send(SaveBegun(step, time.time()))

    def follow(self, save: SaveHandle) -> None:
        """Report the save's milestones as they come, from the threads that complete its Futures."""
        self._events.send(SaveReturned(save.step, save.staging_completion.done()))

        def staged(future: Future[None]) -> None:
            if future.exception() is None:
                self._events.send(SaveStaged(save.step, time.time()))

        def committed(future: Future[CheckpointInfo]) -> None:
            error = future.exception()
            self._events.send(SaveFailed(save.step, repr(error)) if error else _describe(save))

        save.staging_completion.add_done_callback(staged)
        save.upload_completion.add_done_callback(committed)


def _describe(save: SaveHandle) -> SaveCommitted:
    report = save.report
    return SaveCommitted(
        report.step,
        report.nbytes,
        report.blocked_secs,
        report.staged_secs,
        report.written_secs,
        report.synced_secs,
        report.committed_secs,
    )


def train_without_checkpoints(settings: TrainingSettings, run: Run, progress: Progress) -> None:
    """The run that everything else is compared with."""
    for step in range(1, settings.steps + 1):
        progress.step_done(step, run.train_step())


def train_with_checkpoints(config: TrainingConfig, directory: Path, run: Run, progress: Progress) -> None:
    """Train from the newest valid checkpoint, if there is one, and save every few steps while training goes on.

    Of several ranks each calls it: they save and load together.
    """
    settings = config.training
    with Checkpointer(directory, config=config) as ckpt:
        resumed = ckpt.load(into=run.state)  # None: nothing to resume from
        first_step = resumed.step + 1 if resumed else 1
        progress.resumed(first_step - 1, [f"{skipped.name}: {skipped.reason}" for skipped in ckpt.skipped])

        ckpt.guard(run.optimizer)  # its step() waits for a snapshot that is still being taken
        for step in range(first_step, settings.steps + 1):
            loss = run.train_step()
            progress.step_done(step, loss)
            if step == first_step:
                ckpt.warmup(run.state)  # now that AdamW has its state, the snapshot's size is known
            if step % settings.save_every == 0:
                progress.save_begins(step)
                save = ckpt.save(step, run.state)  # training goes on while this becomes durable
                progress.follow(save)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="python -m stager.demo.train", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DemoConfig as JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where losses.jsonl and final.pt go")
    parser.add_argument("--events-fd", type=int, required=True, help="the write end of the parent's pipe")
    parser.add_argument("--checkpoints", type=Path, help="save to, and resume from, this directory")
    arguments = parser.parse_args(argv)

    config = DemoConfig.model_validate_json(arguments.config.read_bytes())
    events = EventWriter(arguments.events_fd)
    run = TrainingRun(config.demo)
    with open(arguments.run_dir / "losses.jsonl", "w", encoding="utf-8") as losses:
        progress = Progress(events, losses)
        if arguments.checkpoints is None:
            train_without_checkpoints(config.demo, run, progress)
        else:
            train_with_checkpoints(config, arguments.checkpoints, run, progress)
    run.save_final(arguments.run_dir / "final.pt")


if __name__ == "__main__":
    main()
