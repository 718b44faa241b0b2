"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_torch_checkpointing DIRECTORY``.

Each round trains the same model without saving, with torch_checkpointing's ``CheckpointManager`` as it is, and with
``StagerCheckpointManager``, both asynchronous. What a save costs is the time from its beginning to the next one, less the
time of as many steps without a save. The first save of a training is left out. torch_checkpointing's own storage is used
without O_DIRECT, with which it cannot write on every file system.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shutil
import statistics
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch_checkpointing
from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from stager.integrations.torch_checkpointing import StagerCheckpointManager
from stager.workers._version import __version__

_NUM_SAVES = 5
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
    for step in range(options.every * (_NUM_SAVES + 2)):
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    calls: dict[str, list[float]] = {way: [] for way in WAYS}
    ends: dict[str, list[float]] = {way: [] for way in WAYS}
    nbytes = 0
    for number in range(options.rounds):
        for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):  # none is always the first
            intervals, in_calls, end, nbytes = _intervals(way, options.directory / "compared", options)
            taken[way] += intervals
            calls[way] += in_calls
            ends[way].append(end)
    plain = statistics.median(taken["no save"])
    low, _, high = statistics.quantiles(taken["no save"])
    print(
        f"torch_checkpointing {torch_checkpointing.__version__}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; {nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of "
        f"{plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves; half of the intervals "
        f"without a save are within {high - low:.3f} s"
    )
    for way, seconds in taken.items():
        lost, in_call, end = (statistics.median(seconds) - plain, *map(statistics.median, (calls[way], ends[way])))
        print(f"{way:20} {lost:7.3f} s lost per save   {in_call:7.3f} s in save()   {end:7.3f} s at the end")


if __name__ == "__main__":
    main()
