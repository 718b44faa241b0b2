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
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from stager.integrations.deepspeed import use
from tests.integrations.comparing import NUM_SAVES, compare, parser_of

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
        for step in range(options.every * (NUM_SAVES + 2)):
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
    parser = parser_of(__doc__)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3))
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    deepspeed.init_distributed()
    ways = WAYS
    if AsyncIOBuilder().is_compatible():
        ways += tuple(_COMPILED_WAYS)
    else:
        print("async_io does not compile here, so that DeepSpeed's engines Fast and Decoupled are not run")
    compare(f"deepspeed {deepspeed.__version__}, ZeRO {options.stage}", ways, _train, options, "save_checkpoint()")


if __name__ == "__main__":
    main()
