"""``stager ls``: the checkpoints of a run, and the directories that are not valid checkpoints and why."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import byte_progress, print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.selection import directory_nbytes, is_checkpoint, require_directory

if TYPE_CHECKING:
    from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint


class RowStatus(str, Enum):
    """What a directory of a run is."""

    COMMITTED = "committed"
    PARTIAL = "partial"
    INVALID = "invalid"


@dataclass(frozen=True)
class Row:
    """One directory of a run.

    Attributes:
        name: of the directory.
        status: what it is.
        reason: why it is not a valid checkpoint.
        nbytes: size of its files.
        created: unix time of the snapshot, or of the last change if it is not committed.
        step, num_tensors, num_objects: None if they are not known.
        metrics: as they were given to ``save()``; None if that is not known.
    """

    name: str
    path: str
    status: RowStatus
    reason: str
    nbytes: int
    created: float
    step: int | None
    num_tensors: int | None
    num_objects: int | None
    metrics: dict[str, float | str] | None = None


def ls(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run's directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every byte; exit 1 if a checkpoint is damaged.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints in DIR: committed, partial (never committed, or being written now), invalid and why."""
    from stager.workers.checkpoint.storage.paths import place_path

    directory = place_path(directory)
    rows = list_rows(directory)
    if verify:
        rows = _verified(rows)
    if as_json:
        print_json({"directory": directory, "checkpoints": [asdict(row) for row in rows]})
    else:
        _print_table(directory, rows)
    if verify and any(row.status is RowStatus.INVALID for row in rows):
        raise typer.Exit(1)


def list_rows(directory: str) -> list[Row]:
    """List every committed, partial or invalid checkpoint in ``directory``, by name. Only manifests are read.

    Raises:
        CheckpointNotFoundError: no such directory.
        UsageError: ``directory`` is a checkpoint itself.
    """
    from stager.workers.checkpoint.directory.run_directory import list_checkpoints
    from stager.workers.errors import UsageError

    require_directory(directory)
    if is_checkpoint(directory):
        raise UsageError(f"{directory} is one checkpoint; use 'stager inspect' or 'stager verify', or name the run")
    committed, skipped = list_checkpoints(directory)
    rows = [_committed_row(info) for info in committed] + [_skipped_row(directory, item) for item in skipped]
    return sorted(rows, key=lambda row: row.name)


def _committed_row(info: CheckpointInfo) -> Row:
    from stager.workers.checkpoint.documents import metrics

    return Row(
        name=os.path.basename(info.path),
        path=info.path,
        status=RowStatus.COMMITTED,
        reason="",
        nbytes=info.nbytes,
        created=info.created,
        step=info.step,
        num_tensors=info.num_tensors,
        num_objects=info.num_objects,
        metrics=metrics.encode(info.metrics),
    )


def _skipped_row(directory: str, skipped: SkippedCheckpoint) -> Row:
    path = os.path.join(directory, skipped.name)
    digits = skipped.name.removeprefix("step-").partition(".")[0]
    try:
        nbytes, changed = directory_nbytes(path), os.stat(path).st_mtime
    except OSError:  # it was committed or removed meanwhile, or is a file
        nbytes, changed = 0, 0.0
    return Row(
        name=skipped.name,
        path=path,
        status=RowStatus.PARTIAL if ".partial-" in skipped.name or ".removing-" in skipped.name else RowStatus.INVALID,
        reason=skipped.reason,
        nbytes=nbytes,
        created=changed,
        step=int(digits) if digits.isdigit() else None,
        num_tensors=None,
        num_objects=None,
    )


def _verified(rows: list[Row]) -> list[Row]:
    from stager.workers.checkpoint.read.verify import verify_checkpoint

    checked = list(rows)
    with byte_progress() as progress:
        total = sum(row.nbytes for row in rows if row.status is RowStatus.COMMITTED)
        bar = progress.add_task("verify", total=total)
        for index, row in enumerate(rows):
            if row.status is RowStatus.COMMITTED:
                result = verify_checkpoint(row.path, progress=lambda nbytes: progress.advance(bar, nbytes))
                if not result.ok:
                    checked[index] = replace(row, status=RowStatus.INVALID, reason="; ".join(result.problems))
    return checked


def _print_table(directory: str, rows: list[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    from stager.config.sizes import format_bytes
    from stager.workers.checkpoint.directory.choice import runs_inside

    console = stdout()
    if not rows:
        found = f"no checkpoints in {directory}{runs_inside(directory)}"
        console.print(printable(found), markup=False, soft_wrap=True)
        return
    colours = {RowStatus.COMMITTED: "green", RowStatus.PARTIAL: "yellow", RowStatus.INVALID: "red"}
    table = Table("step", "status", "size", "created", "tensors", "objects", box=None, padding=(0, 2, 0, 0))
    for column in (0, 2, 4, 5):
        table.columns[column].justify = "right"
    has_metrics = any(row.metrics for row in rows)
    if has_metrics:
        table.add_column("metrics", overflow="fold")
    for row in rows:
        table.add_row(
            _count(row.step),
            Text(row.status.value, style=colours[row.status]),
            format_bytes(row.nbytes),
            format_time(row.created),
            _count(row.num_tensors),
            _count(row.num_objects),
            *([Text(format_metrics(row.metrics))] if has_metrics else []),
        )
    console.print(table)
    for row in rows:
        if row.reason:
            reason = printable(row.reason.replace(f"{directory}/", ""))
            named = reason if reason.startswith(row.name) else f"{row.name}: {reason}"
            console.print(named, style=colours[row.status], markup=False, soft_wrap=True)


def format_time(unix: float) -> str:
    """Local time, to the second; empty for 0 (unknown). A time beyond the calendar stays a number of seconds."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix)) if unix else ""
    except (OverflowError, ValueError, OSError):
        return f"{unix:g} s"


def format_metrics(metrics: dict[str, float | str] | None) -> str:
    """``loss 0.25, accuracy 0.9``; what a checkpoint says may be hostile."""
    return ", ".join(f"{printable(name)} {float(value):g}" for name, value in (metrics or {}).items())


def _count(number: int | None) -> str:
    return "" if number is None else str(number)
