"""``stager demo``: train, be killed, resume, compare. The work is in :mod:`stager.demo`, and for ranks in
:mod:`stager.demo.ranks`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from stager.cli.console import stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption


def demo(
    config: ConfigOption = None,
    overrides: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where checkpoints and the PNG go: runs/demo, or, on ranks, runs/demo-ranks."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small GPT on real text while checkpointing; kill it, resume it, and show that nothing was lost.

    On several ranks: torchrun --nproc-per-node 2 -m stager demo --config configs/torchrun.yaml
    """
    from stager.config import load_config

    if is_for_ranks(config, os.environ):
        from stager.demo.ranks import RanksConfig, run_ranks_demo

        for_ranks = load_config(config, overrides or (), model=RanksConfig)
        raise typer.Exit(run_ranks_demo(for_ranks, out or Path("runs/demo-ranks"), stdout(), as_json))

    from stager.demo import DemoConfig, run_demo

    settings = load_config(config, overrides or (), model=DemoConfig)
    raise typer.Exit(run_demo(settings, out or Path("runs/demo"), stdout(), as_json))


def is_for_ranks(config: Path | None, environment: Mapping[str, str]) -> bool:
    """Whether the demo on ranks is meant: by its section in the file, or by having been started by torchrun.

    Raises:
        ConfigError: the file cannot be read, or is for the demo of one process, and torchrun started several.
    """
    from stager.config.layers import file_layer
    from stager.workers.errors import ConfigError

    sections = file_layer(str(config)).values if config is not None else {}
    several = environment.get("WORLD_SIZE", "1") != "1"
    if several and "demo" in sections:
        raise ConfigError(
            f"{config}: section demo is for one process, and torchrun started {environment['WORLD_SIZE']}; "
            "see configs/torchrun.yaml, or start it without torchrun"
        )
    return several or "demo_ranks" in sections
