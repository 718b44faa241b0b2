"""``stager demo``, alone or as each rank that torchrun has started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from stager.demo.bars import Bars
from stager.demo.config import DemoConfig
from stager.demo.report import print_report, write_results
from stager.demo.results import Results
from stager.demo.sharded import leave, train_rank
from stager.demo.story import Story
from stager.demo.workspace import Workspace
from stager.workers.errors import UsageError

TORCHRUN = "torchrun --nproc-per-node 2 -m stager demo --config configs/torchrun.yaml"


def run_demo(config: DemoConfig, out_dir: Path, console: Console, as_json: bool = False, store: str = "") -> int:
    """Run the demo and print what it showed.

    All ranks train once.  Then rank 0 goes on alone and prints, and the others end: torchrun waits for rank 0, and ends with
    its exit code.

    Args:
        config: what to train and how to save; see :class:`DemoConfig`.
        out_dir: where checkpoints, the chart ``demo.png`` and ``results.json`` go: an empty directory, a new one, or
            that of an earlier demo, which is cleared.
        console: where progress and the tables go.
        store: URL in an object store, under which the checkpoints go instead.
        as_json: print ``results.json`` on ``console`` and nothing else; progress goes to stderr.

    Returns:
        0: everything was shown; 1: something was not, and the table says what.

    Raises:
        UsageError: matplotlib is not installed; ``out_dir`` holds something else; the number of ranks that torchrun
            started does not fit the configuration.
        StorageError: ``out_dir`` has too little free space.
        JobError: a job failed where nothing should have killed it.
    """
    rank, num_ranks = find_ranks(os.environ, config)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws its chart with matplotlib, which is not installed: pip install 'stager[demo]'")
    started = time.monotonic()
    config = config.with_fixed_threads(num_ranks)
    if rank != 0:
        train_rank(config, True, Path(os.devnull), None, lambda _: None)
        leave()
    workspace = Workspace.prepare(out_dir, config, store)
    with Bars(Console(stderr=True) if as_json else console) as bars:
        results = Story(config, num_ranks, workspace, bars).tell()
    results.elapsed_secs = time.monotonic() - started
    return conclude(results, config, workspace, console, as_json)


def find_ranks(environment: Mapping[str, str], config: DemoConfig) -> tuple[int, int]:
    """Return this process's rank and the number of ranks, from what torchrun says.

    Raises:
        UsageError: the number does not fit the configuration, or the ranks are on several hosts.
    """
    num_ranks = world_size(environment)
    if num_ranks == 1 and config.demo.other_ranks:
        raise UsageError(f"demo.other_ranks resumes a run of several ranks; start them with torchrun:\n  {TORCHRUN}")
    if int(environment.get("LOCAL_WORLD_SIZE") or num_ranks) != num_ranks:
        raise UsageError(f"the demo runs on one host, and torchrun started {num_ranks} ranks on several")
    try:
        config.demo.check_ranks(num_ranks)
    except ValueError as error:
        raise UsageError(f"demo: {error}") from error
    return int(environment.get("RANK", "0")), num_ranks


def world_size(environment: Mapping[str, str]) -> int:
    """Return the number of ranks that were started together; 1 without torchrun.

    Raises:
        UsageError: WORLD_SIZE is set and RANK is not, so that this process cannot find the others.
    """
    num_ranks = int(environment.get("WORLD_SIZE") or 1)
    if num_ranks > 1 and not environment.get("RANK"):
        raise UsageError(f"WORLD_SIZE is {num_ranks} and RANK is not set; start the ranks with torchrun:\n  {TORCHRUN}")
    return num_ranks


def conclude(results: Results, config: DemoConfig, workspace: Workspace, console: Console, as_json: bool) -> int:
    """Draw, write and print the results; returns the exit code.

    Large files are removed, unless they are evidence of a failure.
    """
    from stager.demo.chart import draw_chart  # late: matplotlib takes a second to import

    draw_chart(results, workspace.chart)
    write_results(results, config, workspace)
    print_report(results, config, workspace, console, as_json)
    if results.ok:
        for leg in results.runs:
            leg.final.unlink(missing_ok=True)
            shutil.rmtree(leg.directory / "checkpoints", ignore_errors=True)
        workspace.remove_old_checkpoints()
        shutil.rmtree(workspace.measured, ignore_errors=True)
    return 0 if results.ok else 1
