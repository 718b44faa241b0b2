"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_accelerate DIRECTORY``.

Each round trains the same model without saving, with ``Accelerator.save_state()``, and with stager. What a save costs is the
time from its beginning to the next one, less the time of as many steps without a save. The first save of a training is left
out.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from stager.integrations.accelerate import AcceleratorCheckpointer
from tests.integrations.accelerate_bodies import reset
from tests.integrations.comparing import NUM_SAVES, compare, parser_of

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
        for step in range(options.every * (NUM_SAVES + 2)):
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
    options = parser_of(__doc__).parse_args()
    compare(f"accelerate {accelerate.__version__}", WAYS, _intervals, options, "save_state()")


if __name__ == "__main__":
    main()
