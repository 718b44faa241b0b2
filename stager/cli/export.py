"""``stager export``: a checkpoint as one file for other programs."""

from __future__ import annotations

import os
from dataclasses import asdict
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stager.cli.console import byte_progress, print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.selection import directory_nbytes, select_checkpoints
from stager.workers.wording import first_of

if TYPE_CHECKING:
    from stager.exporting.export import Exported

_SHOWN_NAMES = 5


class FileFormat(str, Enum):
    """The format of an exported file."""

    TORCH = "torch"
    SAFETENSORS = "safetensors"


def export(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the run's directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write.")],
    *,
    step: Annotated[
        int | None, typer.Option(min=0, help="Which one in a run's directory; the newest otherwise.")
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these keys, e.g. 'model'; may be repeated."),
    ] = None,
    strip_prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Names lose it. With --keys model, 'model.' makes a file of weights alone."),
    ] = None,
    file_format: Annotated[
        FileFormat | None,
        typer.Option("--format", help="torch: all of it. safetensors: its tensors. By OUT's ending if not given."),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(metavar="BYTES", help="Memory for data, e.g. 256MiB; the checkpoint may be much larger.")
    ] = "1GiB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Unpickle any object: runs code from the checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to one file that torch.load or safetensors reads, checking every hash on the way."""
    (checkpoint,) = select_checkpoints(path, step)
    result = run_export(
        checkpoint,
        out,
        keys=keys,
        strip_prefix=strip_prefix,
        file_format=None if file_format is None else file_format.value,
        max_memory_bytes=_bytes(max_memory),
        allow_pickle=allow_pickle,
        force=force,
    )
    if as_json:
        print_json(asdict(result))
    else:
        _print(result)


def run_export(checkpoint: str, out: str, *, keys: list[str] | None, **options: Any) -> Exported:
    """Export with a progress bar.

    Args:
        keys, options: as of ``export_checkpoint()``.
    """
    from stager.exporting.export import export_checkpoint

    with byte_progress() as progress:
        # How large a part is stands in the manifest, which the export reads: without an end until then.
        total = directory_nbytes(checkpoint) if keys is None and os.path.isdir(checkpoint) else None
        bar = progress.add_task("export", total=total)
        advance = partial(progress.advance, bar)
        return export_checkpoint(checkpoint, out, keys=keys, progress=advance, **options)


def _bytes(text: str) -> int:
    from stager.config.sizes import parse_bytes
    from stager.workers.errors import UsageError

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--max-memory {text}: {error}; write bytes, or text such as 256MiB") from error


def _print(result: Exported) -> None:
    from stager.config.sizes import format_bytes

    facts = f"{result.num_tensors} tensors, {result.num_objects} objects, {format_bytes(result.nbytes)}"
    console = stdout()
    line = f"{printable(result.path)}: step {result.step}, {result.format}, {facts}, {result.secs:.2f} s"
    console.print(line, markup=False, soft_wrap=True)
    if result.left_out:
        names = printable(first_of(result.left_out, _SHOWN_NAMES))
        console.print(f"left out, because safetensors holds tensors only: {names}", markup=False, soft_wrap=True)
