"""``stager prune``: remove old checkpoints by rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.options import JsonOption

if TYPE_CHECKING:
    from stager.workers.checkpoint.maintenance.retention import PruneReport
    from stager.workers.checkpoint.maintenance.retention_rules import KeepBest


def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")],
    *,
    keep_latest: Annotated[
        int | None, typer.Option("--keep-latest", min=1, metavar="N", help="Keep the N newest that are valid.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, metavar="K", help="Keep steps that are multiples of K.")
    ] = None,
    keep_every_secs: Annotated[
        float | None,
        typer.Option("--keep-every-secs", metavar="S", help="Keep the first checkpoint of each S seconds."),
    ] = None,
    keep_best: Annotated[
        str | None,
        typer.Option("--keep-best", metavar="METRIC[:MODE[:N]]", help="Keep the N best; MODE is min (default) or max."),
    ] = None,
    protect: Annotated[
        list[int] | None, typer.Option("--protect", min=0, metavar="STEP", help="Keep this step; may be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not hash the newest before others are removed; names and sizes only.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove checkpoints that no rule keeps; the newest valid one always stays. Works beside a live run.

    Exit 1 if one that no rule keeps could not be removed, or one that would count is damaged.
    """
    from stager.operations import prune as run_prune
    from stager.workers.checkpoint.maintenance.retention import PruneFate
    from stager.workers.checkpoint.storage.paths import place_path
    from stager.workers.errors import UsageError

    if all(rule is None for rule in (keep_latest, keep_every, keep_every_secs, keep_best)):
        raise UsageError(
            "without a rule all checkpoints are kept; give at least one of --keep-latest, --keep-every, --keep-every-secs "
            "and --keep-best"
        )
    report = run_prune(
        run,
        keep_latest=keep_latest,
        keep_every=keep_every,
        keep_every_secs=keep_every_secs,
        keep_best=None if keep_best is None else _keep_best(keep_best),
        protect=protect or (),
        full=not quick,
        dry_run=dry_run,
    )
    ok = not report.steps(PruneFate.LEFT)
    if as_json:
        print_json({"directory": place_path(run), "ok": ok, **_as_json(report)})
    else:
        _print(run, report)
    if not ok:
        raise typer.Exit(1)


def _keep_best(text: str) -> KeepBest:
    """Read ``loss``, ``loss:min`` or ``loss:min:3``; the metric's name may have colons of its own."""
    from stager.workers.checkpoint.maintenance.retention_rules import KeepBest

    count, mode = 1, "min"
    name, _, last = text.rpartition(":")
    if name and last.isdecimal():
        text, count = name, int(last)
    name, _, last = text.rpartition(":")
    if name and last in ("min", "max"):
        text, mode = name, last
    return KeepBest(text, "max" if mode == "max" else "min", count)


def _as_json(report: PruneReport) -> dict[str, object]:
    return {
        "dry_run": report.dry_run,
        "freed_bytes": report.freed_bytes,
        "checkpoints": [
            {"step": verdict.step, "path": verdict.path, "fate": verdict.fate.value, "reason": verdict.reason}
            for verdict in report.verdicts
        ],
    }


def _print(run: str, report: PruneReport) -> None:
    from stager.config.sizes import format_bytes
    from stager.workers.checkpoint.directory.choice import runs_inside
    from stager.workers.checkpoint.maintenance.retention import PruneFate
    from stager.workers.checkpoint.storage.paths import place_path

    console = stdout()
    if not report.verdicts:
        found = f"no checkpoints in {run}{runs_inside(place_path(run))}"
        console.print(printable(found), markup=False, soft_wrap=True)
        return
    removed = "would remove" if report.dry_run else "removed"
    words = {PruneFate.KEPT: "kept", PruneFate.REMOVED: removed, PruneFate.LEFT: "left"}
    for verdict in report.verdicts:
        line = f"{words[verdict.fate]:<{len(removed)}}  step {verdict.step}: {printable(verdict.reason)}"
        console.print(line, markup=False, soft_wrap=True)
    freed = "would be freed" if report.dry_run else "freed"
    console.print(f"{format_bytes(report.freed_bytes)} {freed}", markup=False, soft_wrap=True)
