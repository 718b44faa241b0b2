"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_torchtitan DIRECTORY``.

Each round trains the same model in the loop of ``Trainer.train()`` without saving, with torchtitan's own manager in each of
its modes that runs here, and with stager. What a save costs is the time from its beginning to the next one, less the time of
as many steps without a save. The first save of a training is left out.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from stager.integrations.torchtitan import StagerCheckpointManager
from tests.integrations.comparing import NUM_SAVES, compare, parser_of
from tests.integrations.torchtitan_bodies import Position, Progress

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
    for step in range(1, options.every * (NUM_SAVES + 2) + 1):
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
    options = parser_of(__doc__).parse_args()
    logging.disable(logging.WARNING)
    ways = [way for way in WAYS if way != _ON_ACCELERATORS or torch.accelerator.is_available()]
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=0, world_size=1)
        try:
            compare(f"torchtitan {version('torchtitan')}", ways, _intervals, options)
        finally:
            dist.destroy_process_group()
    if _ON_ACCELERATORS not in ways:
        print(f"{_ON_ACCELERATORS:34} needs an accelerator, and there is none")


if __name__ == "__main__":
    main()
