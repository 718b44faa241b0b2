"""``stager verify``: is a checkpoint, byte for byte, what was committed?"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import byte_progress, print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.selection import directory_nbytes, select_checkpoints

if TYPE_CHECKING:
    from stager.workers.checkpoint.read.verify import VerifyReport


def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the run's directory.")],
    *,
    step: Annotated[
        int | None, typer.Option(min=0, help="Which one in a run's directory; the newest otherwise.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint in the run's directory.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, file names and sizes only; no hashes.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Files that do not belong to the checkpoint are problems, too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that hash; the usable cores otherwise.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a checkpoint is what was committed: every byte of every file. Exit 1 and the list of problems if not."""
    results = run_verify(select_checkpoints(path, step, all_steps=every), quick, threads, strict=strict)
    if as_json:
        ok = all(result.ok for result in results)
        print_json({"ok": ok, "quick": quick, "strict": strict, "checkpoints": [asdict(result) for result in results]})
    else:
        for result in results:
            _print(result, quick)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def run_verify(paths: list[str], quick: bool, threads: int | None, *, strict: bool = False) -> list[VerifyReport]:
    """Verify each directory, with one progress bar over the bytes of all."""
    from stager.operations import verify as verify_one

    results = []
    with byte_progress() as progress:
        total = sum(map(directory_nbytes, paths))
        bar = progress.add_task("verify", total=total)
        for path in paths:
            progress.update(bar, description=f"verify {os.path.basename(path)}")
            result = verify_one(
                path,
                full=not quick,
                strict=strict,
                num_threads=threads,
                progress=lambda nbytes: progress.advance(bar, nbytes),
            )
            results.append(result)
    return results


def _print(result: VerifyReport, quick: bool) -> None:
    from stager.config.sizes import format_bytes

    console = stdout()
    name = printable(result.path)
    if result.ok:
        how = "names and sizes" if quick else "every byte"
        facts = f"{result.num_items} items, {format_bytes(result.nbytes)}, {result.secs:.2f} s"
        console.print(f"ok   {name}: {how} as committed ({facts})", markup=False, soft_wrap=True)
        _print_strangers(result)
        return
    console.print(f"BAD  {name}: {len(result.problems)} problem(s)", markup=False, soft_wrap=True)
    for problem in result.problems:
        console.print(f"     {printable(problem)}", markup=False, soft_wrap=True)
    _print_strangers(result)


def _print_strangers(result: VerifyReport) -> None:
    if result.strangers:
        beside = ", ".join(map(printable, result.strangers))
        stdout().print(f"     note: not of this checkpoint: {beside}", markup=False, soft_wrap=True)
