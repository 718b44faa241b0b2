"""``stager stress``: faults in training loops, and a check after each. The work is in :mod:`stager.stress`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from stager.cli.console import stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption, load_settings


def stress(
    config: ConfigOption = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="How long new episodes are begun.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Draws everything; the same seed draws the same.")] = 0,
    episode: Annotated[
        list[int] | None, typer.Option(min=0, help="Play this episode of the seed, and no other; may be repeated.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where evidence and results go.")] = "runs/stress",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Kill and stop processes, fill disks, damage files; check that nothing hangs or leaks and staged saves are safe."""
    from stager.stress import StressConfig, StressOptions, run_stress
    from stager.workers.checkpoint.storage.paths import local_path

    settings = load_settings(config, overrides, StressConfig)
    options = StressOptions(seed, minutes, Path(local_path(out, "--out")), tuple(episode or ()))
    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: end what was started, print what was seen
    try:
        code = run_stress(settings, options, stdout(), as_json)
    finally:
        signal.signal(signal.SIGTERM, before)
    raise typer.Exit(code)
