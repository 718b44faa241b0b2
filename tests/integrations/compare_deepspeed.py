"""Seconds that a loop loses per save: ``python -m tests.integrations.compare_deepspeed DIRECTORY``.

Each round trains the same model without saving, with DeepSpeed's own engine, and with stager. What a save costs is the time
from its beginning to the next one, less the time of as many steps without a save. The first save of a training is left out.
DeepSpeed's other engines, Fast and Decoupled, need a compiled writer (``async_io``); where it does not compile, the script
says so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import statistics
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from stager.integrations.deepspeed import use
from stager.workers._version import __version__

_NUM_SAVES = 5
WAYS: tuple[str, ...] = ("no save", "DeepSpeed", "stager", "stager, guard=False")
_COMPILED_WAYS = {
    "DeepSpeed, Fast": {"type": "FAST", "decoupled": False},
    "DeepSpeed, Decoupled": {"type": "FAST", "decoupled": True},
}


def _engine(way: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(options.width, options.width) for _ in range(options.layers)]
    model = torch.nn.Sequential(*layers)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch,
        "zero_optimization": {"stage": options.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.stage > 0},
    }
    if way in _COMPILED_WAYS:
        config["checkpoint"] = {"writer": _COMPILED_WAYS[way]}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]


def _train(way: str, directory: Path, options: argparse.Namespace) -> tuple[list[float], list[float], float, int]:
    """Train once. Returns the seconds between saves, those in the calls, those of the end, and the bytes of a checkpoint."""
    engine = _engine(way, options)
    dtype = torch.bfloat16 if options.stage > 0 else torch.float32
    batch = torch.randn(options.batch, options.width, dtype=dtype)
    closing: AbstractContextManager[Any] = nullcontext()
    if way.startswith("stager"):
        closing = use(engine, guard=way == "stager")
    begins, calls = [], []
    with closing:
        for step in range(options.every * (_NUM_SAVES + 2)):
            engine.backward(engine(batch).float().square().mean())
            engine.step()
            if step % options.every == 0:
                begins.append(time.perf_counter())
                if way != "no save":
                    engine.save_checkpoint(str(directory), tag=f"step{step % (2 * options.every)}")  # two at a time
                calls.append(time.perf_counter() - begins[-1])
        ended = time.perf_counter()
    engine.destroy()  # the decoupled engine waits here
    closed = time.perf_counter()
    nbytes = sum(path.stat().st_size for path in directory.rglob("*.pt")) // 2
    shutil.rmtree(directory, ignore_errors=True)
    intervals = [after - before for before, after in itertools.pairwise(begins[1:])]
    return intervals, calls[1:], closed - ended, nbytes


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    deepspeed.init_distributed()
    ways = WAYS
    if AsyncIOBuilder().is_compatible():
        ways += tuple(_COMPILED_WAYS)
    else:
        print("async_io does not compile here, so that DeepSpeed's engines Fast and Decoupled are not run")
    taken: dict[str, list[float]] = {way: [] for way in ways}
    calls: dict[str, list[float]] = {way: [] for way in ways}
    ends: dict[str, list[float]] = {way: [] for way in ways}
    nbytes = 0
    for number in range(options.rounds):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):  # none is always the first
            intervals, in_calls, end, written = _train(way, options.directory / "compared", options)
            taken[way] += intervals
            calls[way] += in_calls
            ends[way].append(end)
            nbytes = max(nbytes, written)
    plain = statistics.median(taken["no save"])
    low, _, high = statistics.quantiles(taken["no save"])
    print(
        f"deepspeed {deepspeed.__version__}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; ZeRO {options.stage}, {nbytes / 1e6:.0f} MB a checkpoint, a save every "
        f"{options.every} steps of {plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves; half of "
        f"the intervals without a save are within {high - low:.3f} s"
    )
    for way, seconds in taken.items():
        lost = statistics.median(seconds) - plain
        called, at_end = statistics.median(calls[way]), statistics.median(ends[way])
        print(
            f"{way:20} {lost:7.3f} s lost per save   {called:7.3f} s in save_checkpoint()   {at_end:7.3f} s at the end"
        )


if __name__ == "__main__":
    main()
