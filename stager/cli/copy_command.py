"""``stager copy``: copy checkpoints to another place, checked on the way."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from stager.cli.console import byte_progress, print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.selection import directory_nbytes, select_checkpoints


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint, or a run: its newest checkpoint.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The directory of a run, or its URL.")],
    *,
    step: Annotated[int | None, typer.Option(min=0, help="The run's checkpoint of this step.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a checkpoint of the same name that is there from another save.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy checkpoints between directories and object stores. Every byte is compared with its hash.

    Exit 1 if a checkpoint is damaged, the destination is in use, or has a checkpoint of the same name from another save.
    """
    from stager.copying import copy_checkpoints

    with byte_progress() as progress:
        total = sum(map(directory_nbytes, select_checkpoints(source, step, all_steps=every)))
        bar = progress.add_task("copy", total=total)
        report = copy_checkpoints(
            source,
            destination,
            step=step,
            every=every,
            replace=replace,
            progress=lambda nbytes: progress.advance(bar, nbytes),
        )
    if as_json:
        print_json({**asdict(report), "copied": [asdict(info) for info in report.copied]})
        return
    console = stdout()
    for info in report.copied:
        console.print(f"copied {printable(info.path)}", markup=False, soft_wrap=True)
    for name in report.there:
        console.print(f"there already: {printable(name)}", markup=False, soft_wrap=True)
