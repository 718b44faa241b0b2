"""The training of the GPT, with checkpoints or without.

:func:`train_with_checkpoints` is the loop to copy; nothing in it asks how many ranks there are.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from stager import Checkpointer, CheckpointInfo, SaveHandle
from stager.demo.config import DemoConfig, DemoSettings
from stager.demo.events import (
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveReturned,
    SaveStaged,
    SendEvent,
    StepDone,
    write_loss,
)
from stager.demo.model import GPT
from stager.demo.text import VOCABULARY_SIZE, TextBatches, read_corpus
from stager.state.rng_state import RngState


class TrainingRun:
    """Everything a training run is made of, and one step of it.

    On a CPU every operation used here gives the same bits in every run that uses the same number of threads, so two
    runs of one configuration are equal bit for bit.
    """

    rank = 0

    def __init__(self, settings: DemoSettings) -> None:
        torch.set_num_threads(settings.threads_for(1))
        seed_generators(settings.seed)
        self._last_dropout_step = settings.last_dropout_step
        self.model = self._placed(make_model(settings))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, settings.warmup_steps, settings.steps)
        )
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
        """Take one optimizer step on the next batch; returns the loss, in nats per byte."""
        if self.scheduler.last_epoch >= self._last_dropout_step:
            self.model.eval()  # no more dropout
        inputs, targets = self._own_part(*next(self.loader))
        loss: torch.Tensor = self.model(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return self._mean(loss.detach()).item()

    def save_final(self, path: Path) -> None:
        """Write the state at the end of the run with ``torch.save``, for the comparison."""
        torch.save({name: value.state_dict() for name, value in self.state.items()}, path)

    # What differs where a rank is one of several: see sharded.py.

    def _placed(self, model: GPT) -> GPT:
        return model

    def _own_part(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs, targets

    def _clip_gradients(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def seed_generators(seed: int) -> None:
    """Seed every generator that a run draws from, but the data loader's own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_model(settings: DemoSettings) -> GPT:
    """Make the GPT; its weights are drawn from torch's generator."""
    return GPT(
        vocabulary_size=VOCABULARY_SIZE,
        block_size=settings.block_size,
        num_layers=settings.n_layer,
        num_heads=settings.n_head,
        width=settings.n_embd,
        dropout=settings.dropout,
    )


def lr_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the learning rate at ``step`` as a share of the highest: a linear rise, then half a cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Progress:
    """Tells the demo how a run proceeds, and keeps the exact loss of each step in a file."""

    def __init__(self, send: SendEvent, losses: IO[str]) -> None:
        self._send = send
        self._losses = losses

    def resumed(self, step: int, skipped: Sequence[str]) -> None:
        self._send(Resumed(step, tuple(skipped)))

    def step_done(self, step: int, loss: float) -> None:
        write_loss(self._losses, step, loss)
        self._send(StepDone(step, loss, time.time()))

    def save_begins(self, step: int) -> None:
        self._send(SaveBegun(step, time.time()))

    def follow(self, save: SaveHandle) -> None:
        """Report the save's milestones as they come, from the threads that complete its Futures."""
        self._send(SaveReturned(save.step, save.staging_completion.done()))

        def staged(future: Future[None]) -> None:
            if future.exception() is None:
                self._send(SaveStaged(save.step, time.time()))

        def committed(future: Future[CheckpointInfo]) -> None:
            error = future.exception()
            self._send(SaveFailed(save.step, repr(error)) if error else _describe(save))

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


def train_without_checkpoints(settings: DemoSettings, run: TrainingRun, progress: Progress) -> None:
    """Train the run that everything else is compared with."""
    for step in range(1, settings.steps + 1):
        progress.step_done(step, run.train_step())


def train_with_checkpoints(config: DemoConfig, directory: str, run: TrainingRun, progress: Progress) -> None:
    """Train from the newest valid checkpoint, if there is one, and save every few steps while training goes on.

    Every rank of a job calls it: the ranks save and load together.
    """
    settings = config.demo
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
