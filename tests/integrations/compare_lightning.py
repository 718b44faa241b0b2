"""Seconds that a training loop of Lightning loses per save: ``python -m tests.integrations.compare_lightning DIRECTORY``.

Each round trains the same model with each way to save, and without saving. What a save costs is the time from its beginning
to the next one, less the time of as many steps without a save. The first save of a training is left out.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from stager.integrations.lightning import StagerCheckpointIO, StagerGuard
from stager.workers._version import __version__

_LAYERS, _NUM_SAVES = 6, 5


class _Clock(L.Callback):
    """Notes when each step has ended, before ``ModelCheckpoint`` saves."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


class _Model(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(_LAYERS)])

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = (self.net(batch) - batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def _stager() -> dict[str, Any]:
    return {"plugins": [StagerCheckpointIO()]}


def _guarded() -> dict[str, Any]:
    return {"plugins": [StagerCheckpointIO()], "callbacks": [StagerGuard()]}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "no save": dict,
    "Lightning": dict,
    "AsyncCheckpointIO": lambda: {"plugins": [AsyncCheckpointIO()]},
    "stager": _stager,
    "stager, StagerGuard": _guarded,
}


def _intervals(way: str, directory: Path, width: int, every: int, batch: int) -> tuple[list[float], float]:
    """Train once. Returns the seconds between saves, and how long the end of the fit waited."""
    L.seed_everything(0, verbose=False)
    clock, more = _Clock(), WAYS[way]()
    callbacks = [clock, *more.pop("callbacks", [])]
    if way != "no save":
        callbacks.append(ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=every))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=every * (_NUM_SAVES + 1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=way != "no save",
        callbacks=callbacks,
        **more,
    )
    data = torch.randn(batch * every * (_NUM_SAVES + 1), width)
    trainer.fit(_Model(width), torch.utils.data.DataLoader(data, batch_size=batch))
    ended = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    marks = clock.ends[every - 1 :: every]
    return [after - before for before, after in itertools.pairwise(marks[1:])], ended - clock.ends[-1]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    ends: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            found, end = _intervals(way, options.directory / "ckpt", options.width, options.every, options.batch)
            taken[way] += found
            ends[way].append(end)
    plain = statistics.median(taken["no save"])
    nbytes = 3 * 4 * _LAYERS * options.width**2
    print(
        f"lightning {L.__version__}, torch {torch.__version__}, stager {__version__}, Python {platform.python_version()}; "
        f"{nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of {plain / options.every:.3f} s; "
        f"{options.rounds} rounds of {_NUM_SAVES} saves"
    )
    for way, seconds in taken.items():
        lost = statistics.median(seconds) - plain
        print(f"{way:22} {lost:7.3f} s lost per save   {statistics.median(ends[way]):7.3f} s at the end of the fit")


if __name__ == "__main__":
    main()
