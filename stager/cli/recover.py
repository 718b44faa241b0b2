"""``stager recover``: finish or remove what a crash left of a save."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.selection import is_checkpoint, require_directory

if TYPE_CHECKING:
    from stager.workers.checkpoint.maintenance.recover import RecoveredDirectory


def recover(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Commit what was written in whole, remove what was not. A new run does so by itself. Refuses while a run is alive.

    Exit 1 if something could not be dealt with.
    """
    found = run_recover(os.path.abspath(run), dry_run)
    left = [item for item in found if item.outcome.name == "LEFT"]
    if as_json:
        rows = [{"name": item.name, "outcome": item.outcome.name.lower(), "reason": item.reason} for item in found]
        print_json({"directory": os.path.abspath(run), "ok": not left, "dry_run": dry_run, "found": rows})
    else:
        _print(run, found, dry_run)
    if left:
        raise typer.Exit(1)


def run_recover(directory: str, dry_run: bool) -> list[RecoveredDirectory]:
    """
    Raises:
        CheckpointNotFoundError: no such directory.
        UsageError: it is a checkpoint itself.
        DirectoryInUseError: a run writes there, or workers that it left.
    """
    from stager.workers.checkpoint.directory.run_directory import lock_directory, unused_directory
    from stager.workers.checkpoint.maintenance.recover import recover as recover_all
    from stager.workers.errors import UsageError

    require_directory(directory)
    if is_checkpoint(directory):
        raise UsageError(f"{directory} is one checkpoint; name the run's directory")
    if dry_run:
        with unused_directory(directory):
            return recover_all(directory, dry_run=True)
    lock_fd = lock_directory(directory, 0)
    try:
        return recover_all(directory)
    finally:
        os.close(lock_fd)


def _print(run: str, found: list[RecoveredDirectory], dry_run: bool) -> None:
    console = stdout()
    if not found:
        console.print(f"nothing to recover in {printable(run)}", markup=False, soft_wrap=True)
    words = {"COMMITTED": "commit" if dry_run else "committed", "REMOVED": "remove" if dry_run else "removed"}
    for item in found:
        word = words.get(item.outcome.name, "left")
        prefix = "would " if dry_run and word != "left" else ""
        line = f"{prefix}{word} {printable(item.name)}: {printable(item.reason)}"
        console.print(line, markup=False, soft_wrap=True)
