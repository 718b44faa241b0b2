"""``stager demo``: train, be killed, resume, compare. The work is in :mod:`stager.demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stager.cli.console import stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption


def demo(
    config: ConfigOption = None,
    overrides: SetOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints and the PNG go.")] = Path("runs/demo"),
    as_json: JsonOption = False,
) -> None:
    """Train a small GPT on real text while checkpointing; kill it, resume it, and show that nothing was lost."""
    from stager.config import load_config
    from stager.demo import run_demo
    from stager.demo.config import DemoConfig

    settings = load_config(config, overrides or (), model=DemoConfig)
    raise typer.Exit(run_demo(settings, out, stdout(), as_json))
