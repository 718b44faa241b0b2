"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_accelerate DIRECTORY``.

Each round trains the same model without saving, with ``Accelerator.save_state()``, and with stager. What a save costs is the
time from its beginning to the next one, less the time of as many steps without a save. The first save of a training is left
out.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shutil
import statistics
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from stager.integrations.accelerate import AcceleratorCheckpointer
from stager.workers._version import __version__
from tests.integrations.accelerate_bodies import reset

_NUM_SAVES = 5
WAYS = ("no save", "Accelerate", "stager", "stager, guard=False")


def _intervals(way: str, directory: Path, options: argparse.Namespace) -> tuple[list[float], list[float], float, int]:
    """Train once. Returns the seconds between saves, those in the calls, those of the end, and the bytes of the state."""
    reset()
    set_seed(0)
    project = ProjectConfiguration(str(directory), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    layers = [torch.nn.Linear(options.width, options.width) for _ in range(options.layers)]
    model = torch.nn.Sequential(*layers)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    batch = torch.randn(options.batch, options.width)
    is_ours = way.startswith("stager")
    saves: Any = AcceleratorCheckpointer(accelerator, guard=way == "stager") if is_ours else accelerator
    closing: AbstractContextManager[Any] = saves if is_ours else nullcontext()
    begins, calls = [], []
    with closing:
        for step in range(options.every * (_NUM_SAVES + 2)):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if step % options.every == 0:
                begins.append(time.perf_counter())
                if way != "no save":
                    saves.save_state()
                calls.append(time.perf_counter() - begins[-1])
        ended = time.perf_counter()
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
        f"accelerate {accelerate.__version__}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; {nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of "
        f"{plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves; half of the intervals "
        f"without a save are within {high - low:.3f} s"
    )
    for way, seconds in taken.items():
        lost, in_calls, end = (statistics.median(seconds) - plain, *map(statistics.median, (calls[way], ends[way])))
        print(f"{way:20} {lost:7.3f} s lost per save   {in_calls:7.3f} s in save_state()   {end:7.3f} s at the end")


if __name__ == "__main__":
    main()
