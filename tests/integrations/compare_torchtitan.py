"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_torchtitan DIRECTORY``.

Each round trains the same model in the loop of ``Trainer.train()`` without saving, with torchtitan's own manager in each of
its modes that runs here, and with stager. What a save costs is the time from its beginning to the next one, less the time of
as many steps without a save. The first save of a training is left out.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from stager.integrations.torchtitan import StagerCheckpointManager
from stager.workers._version import __version__
from tests.integrations.torchtitan_bodies import Position, Progress

_NUM_SAVES = 5
WAYS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "no save": (CheckpointManager, {"enable": False}),
    "torchtitan, disabled": (CheckpointManager, {"async_mode": "disabled"}),
    "torchtitan, async": (CheckpointManager, {"async_mode": "async"}),
    "torchtitan, async_with_pinned_mem": (CheckpointManager, {"async_mode": "async_with_pinned_mem"}),
    "stager": (StagerCheckpointManager, {}),
    "stager, guard=False": (StagerCheckpointManager, {"guard": False}),
}
_ON_ACCELERATORS = "torchtitan, async_with_pinned_mem"


def _intervals(way: str, directory: Path, options: argparse.Namespace) -> tuple[list[float], list[float], float, int]:
    """Train once. Returns the seconds between saves, those in the calls, those of the end, and the bytes of the state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(options.width, options.width) for _ in range(options.layers)))
    adamw = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})
    optimizers = OptimizersContainer.Config(param_groups=[adamw], implementation="foreach").build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=1000)
    manager, settings = WAYS[way]
    common = {"enable": True, "interval": options.every, "keep_latest_k": 2, "last_save_model_only": False}
    saves = manager.Config(**{**common, **settings}).build(
        dataloader=Position(),
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": Progress()},
        sd_adapter=None,
        base_folder=str(directory),
    )
    batch = torch.randn(options.batch, options.width)
    begins, calls = [], []
    for step in range(1, options.every * (_NUM_SAVES + 2) + 1):
        optimizers.zero_grad()
        model(batch).square().mean().backward()
        saves.maybe_wait_for_staging()
        optimizers.step()
        schedulers.step()
        began = time.perf_counter()
        saves.save(step)
        if step % options.every == 0:
            begins.append(began)
            calls.append(time.perf_counter() - began)
    ended = time.perf_counter()
    saves.maybe_wait_for_saving()  # torchtitan's own close() does not
    saves.close()
    closed = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    nbytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
    intervals = [after - before for before, after in itertools.pairwise(begins[1:])]
    return intervals, calls[1:], closed - ended, nbytes


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=0, world_size=1)
        try:
            _compare(options)
        finally:
            dist.destroy_process_group()


def _compare(options: argparse.Namespace) -> None:
    ways = [way for way in WAYS if way != _ON_ACCELERATORS or torch.accelerator.is_available()]
    taken: dict[str, list[float]] = {way: [] for way in ways}
    calls: dict[str, list[float]] = {way: [] for way in ways}
    ends: dict[str, list[float]] = {way: [] for way in ways}
    nbytes = 0
    for number in range(options.rounds):
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):  # none is always the first
            intervals, in_calls, end, nbytes = _intervals(way, options.directory / "compared", options)
            taken[way] += intervals
            calls[way] += in_calls
            ends[way].append(end)
    plain = statistics.median(taken["no save"])
    low, _, high = statistics.quantiles(taken["no save"])
    print(
        f"torchtitan {version('torchtitan')}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; {nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of "
        f"{plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves; half of the intervals "
        f"without a save are within {high - low:.3f} s"
    )
    for way, seconds in taken.items():
        lost, call, end = (statistics.median(seconds) - plain, *map(statistics.median, (calls[way], ends[way])))
        print(f"{way:34} {lost:7.3f} s lost per save   {call:7.3f} s in save()   {end:7.3f} s at the end")
    if _ON_ACCELERATORS not in ways:
        print(f"{_ON_ACCELERATORS:34} needs an accelerator, and there is none")


if __name__ == "__main__":
    main()
