"""``stager demo``: train, be killed, resume, compare. The work is in :mod:`stager.demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stager.cli.console import stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption, load_settings


def demo(
    config: ConfigOption = None,
    overrides: SetOption = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where checkpoints and the PNG go: runs/demo, or, on ranks, runs/demo-ranks. With s3://bucket/demo the "
            "checkpoints go there.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small GPT on real text while checkpointing; kill it, resume it, and show that nothing was lost.

    On several ranks: torchrun --nproc-per-node 2 -m stager demo --config configs/torchrun.yaml
    """
    from stager.demo import DemoConfig, RanksConfig, run_demo
    from stager.demo.run import world_size
    from stager.workers.checkpoint.storage.paths import place_path
    from stager.workers.checkpoint.storage.places import is_url

    on_ranks = world_size(os.environ) > 1
    settings = load_settings(config, overrides, RanksConfig if on_ranks else DemoConfig)
    here = "runs/demo-ranks" if on_ranks else "runs/demo"
    store = place_path(out, "--out") if out is not None and is_url(out) else ""
    raise typer.Exit(run_demo(settings, Path(here if store else out or here), stdout(), as_json, store))
