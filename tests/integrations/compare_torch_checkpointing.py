"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_torch_checkpointing DIRECTORY``.

Each round trains the same model without saving, with torch_checkpointing's ``CheckpointManager`` as it is, and with
``StagerCheckpointManager``, both asynchronous. What a save costs is the time from its beginning to the next one, less the
time of as many steps without a save. The first save of a training is left out. torch_checkpointing's own storage is used
without O_DIRECT, with which it cannot write on every file system.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch_checkpointing
from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from stager.integrations.torch_checkpointing import StagerCheckpointManager
from tests.integrations.comparing import NUM_SAVES, compare, parser_of

WAYS = ("no save", "torch_checkpointing", "stager")


def _manager(way: str) -> Any:
    if way == "no save":
        return None
    if way == "stager":
        return StagerCheckpointManager.Config.with_async_save().build()
    config = CheckpointManager.Config.with_async_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config.build()


def _intervals(way: str, directory: Path, options: argparse.Namespace) -> tuple[list[float], list[float], float, int]:
    """Train once. Returns the seconds between saves, those in the calls, those of the end, and the bytes of the state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(options.width, options.width) for _ in range(options.layers)])
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(options.batch, options.width)
    manager = _manager(way)
    begins, calls = [], []
    for step in range(options.every * (NUM_SAVES + 2)):
        model(batch).square().mean().backward()
        with nullcontext() if manager is None else manager.lock():
            optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0:
            begins.append(time.perf_counter())
            if manager is not None:
                items = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                manager.save(str(directory / f"step-{step}"), items)
            calls.append(time.perf_counter() - begins[-1])
    ended = time.perf_counter()
    if manager is not None:
        manager.close()
    closed = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    nbytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
    intervals = [after - before for before, after in itertools.pairwise(begins[1:])]
    return intervals, calls[1:], closed - ended, nbytes


def main() -> None:
    """Print a table of medians."""
    options = parser_of(__doc__, rounds=3).parse_args()
    compare(f"torch_checkpointing {torch_checkpointing.__version__}", WAYS, _intervals, options)


if __name__ == "__main__":
    main()
