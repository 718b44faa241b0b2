"""``torchrun -m stager demo``: what each rank of it does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from stager.demo.bars import Bars
from stager.demo.ranks.config import RanksConfig
from stager.demo.ranks.story import RanksStory, train_along
from stager.demo.ranks.training import leave
from stager.demo.report import print_report, write_results
from stager.demo.workspace import Workspace
from stager.workers.errors import UsageError

COMMAND = "torchrun --nproc-per-node 2 -m stager demo --config configs/torchrun.yaml"


def run_ranks_demo(config: RanksConfig, out_dir: Path, console: Console, as_json: bool = False) -> int:
    """Run the demo on the ranks that torchrun has started, of which this process is one.

    All ranks train once.  Then rank 0 goes on alone, prints what it showed, and the others end: torchrun waits for rank 0,
    and ends with its exit code.

    Args: as those of :func:`stager.demo.run_demo`.

    Returns:
        On rank 0.  0: everything was shown; 1: something was not, and the table says what.

    Raises:
        UsageError: not started by torchrun, or with a number of ranks that does not fit the configuration; matplotlib is not
            installed; ``out_dir`` holds something else.
        StorageError: ``out_dir`` has too little free space.
        ChildError: a job that rank 0 started failed.
    """
    rank, num_ranks = find_ranks(os.environ, config)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws its chart with matplotlib, which is not installed: pip install 'stager[demo]'")
    started = time.monotonic()
    if rank != 0:
        _train(lambda: train_along(config))
        leave()
    workspace = Workspace.prepare(out_dir, config)
    with Bars(Console(stderr=True) if as_json else console) as bars:
        story = RanksStory(config, num_ranks, workspace, bars)
        _train(story.train_here)
        results = story.tell()
    results.elapsed_secs = time.monotonic() - started
    conclude(story, config, workspace, console, as_json)
    return results.exit_code


def _train(train: Callable[[], None]) -> None:
    """Act 1, which all ranks play; each calls it."""
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()


def find_ranks(environment: Mapping[str, str], config: RanksConfig) -> tuple[int, int]:
    """This process's rank and the number of ranks, from what torchrun says.

    Raises:
        UsageError: it says nothing, or the number does not do.
    """
    rank, num_ranks = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not (rank.isdigit() and num_ranks.isdigit()):
        raise UsageError(f"this demo trains on several ranks; start it with torchrun:\n  {COMMAND}")
    if int(num_ranks) < 2:
        raise UsageError(f"this demo trains on several ranks, and torchrun started {num_ranks}:\n  {COMMAND}")
    if environment.get("LOCAL_WORLD_SIZE", num_ranks) != num_ranks:
        raise UsageError(f"this demo runs on one host, and torchrun started {num_ranks} ranks on several")
    try:
        config.demo_ranks.check_ranks(int(num_ranks))
    except ValueError as error:
        raise UsageError(f"demo_ranks: {error}") from error
    return int(rank), int(num_ranks)


def conclude(story: RanksStory, config: RanksConfig, workspace: Workspace, console: Console, as_json: bool) -> None:
    """Draw, write and print the results.  Large files go, unless they are evidence of a failure."""
    from stager.demo.ranks.chart import draw_chart  # late: matplotlib takes a second to import

    draw_chart(story, workspace.chart)
    write_results(story.results, config, workspace)
    print_report(story.results, config, workspace, console, as_json)
    if story.results.ok:
        for leg in story.others:
            shutil.rmtree(leg.directory / "checkpoints")
        for directory in [story.truth, *(leg.directory for leg in (*story.legs, *story.others))]:
            (directory / "final.pt").unlink(missing_ok=True)
        workspace.remove_old_checkpoints()
