"""``stager doctor``: checks of this host and a directory, and what to do about each finding."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption, load_settings

if TYPE_CHECKING:
    from stager.doctor import Finding


def doctor(
    directory: Annotated[
        str, typer.Argument(metavar="[DIR]", help="Where checkpoints will go, or a URL; need not exist yet.")
    ] = ".",
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this host and DIR for stager. Writes at most 64 MiB into DIR and removes it. Exit 1 if something fails."""
    from stager.config import StagerConfig
    from stager.doctor import Status, run_checks
    from stager.workers.checkpoint.storage.paths import place_path

    findings = run_checks(place_path(directory), load_settings(config, overrides, StagerConfig))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from stager.doctor import Status

    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    table = Table("", "check", "found", "what it means, what to do", box=None, padding=(0, 2, 0, 0))
    table.columns[2].ratio, table.columns[3].ratio = 2, 3
    for finding in findings:
        meaning = Text(printable(finding.meaning))
        if finding.advice:
            meaning.append(f"\n-> {printable(finding.advice)}", style=colours[finding.status])
        mark = Text(finding.status.value, style=colours[finding.status])
        table.add_row(mark, finding.name, Text(printable(finding.value)), meaning)
    console = stdout()
    console.print(table)
    counts = {status: sum(f.status is status for f in findings) for status in Status}
    console.print(", ".join(f"{number} {status.value}" for status, number in counts.items()))
