"""``stager recover``: finish or remove what a crash left of a save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.options import JsonOption

if TYPE_CHECKING:
    from stager.operations import RecoverReport


def recover(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Commit what was written in whole, remove what was not. A new run does so by itself. Refuses while a run is alive.

    Exit 1 if something could not be dealt with.
    """
    from stager.operations import recover as run_recover

    report = run_recover(run, dry_run=dry_run)
    if as_json:
        rows = [
            {"name": item.name, "outcome": item.outcome.name.lower(), "reason": item.reason} for item in report.found
        ]
        print_json({"directory": report.directory, "ok": report.ok, "dry_run": dry_run, "found": rows})
    else:
        _print(run, report)
    if not report.ok:
        raise typer.Exit(1)


def _print(run: str, report: RecoverReport) -> None:
    from stager.workers.checkpoint.directory.choice import runs_inside

    console = stdout()
    if not report.found:
        found = f"nothing to recover in {run}{runs_inside(report.directory)}"
        console.print(printable(found), markup=False, soft_wrap=True)
    words = {
        "COMMITTED": "commit" if report.dry_run else "committed",
        "REMOVED": "remove" if report.dry_run else "removed",
    }
    for item in report.found:
        word = words.get(item.outcome.name, "left")
        prefix = "would " if report.dry_run and word != "left" else ""
        line = f"{prefix}{word} {printable(item.name)}: {printable(item.reason)}"
        console.print(line, markup=False, soft_wrap=True)
