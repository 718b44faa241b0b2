"""``stager export``: a checkpoint as one file for other programs, or its weights as a directory that they load."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stager.cli.console import byte_progress, print_json, printable, stdout
from stager.cli.options import JsonOption
from stager.cli.rename_option import read_rename
from stager.cli.selection import directory_nbytes, select_checkpoints
from stager.workers.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stager.exporting.export import Exported
    from stager.exporting.weights import ExportedWeights

_SHOWN_NAMES = 5


class FileFormat(str, Enum):
    """The format of an exported file."""

    TORCH = "torch"
    SAFETENSORS = "safetensors"


class ExportLayout(str, Enum):
    """What an export is."""

    FILE = "file"
    HF = "hf"


def export(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the run's directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write; with --layout hf, the directory.")],
    *,
    layout: Annotated[
        ExportLayout, typer.Option(help="file: one file. hf: a directory of weights that from_pretrained() loads.")
    ] = ExportLayout.FILE,
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
    rename: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="hf: a .json or .yaml file of old and new names, or module:function or file.py:function, which gets a "
            "name and returns the new one, or None to leave the weight out.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="hf: convert floating-point tensors, e.g. to bfloat16.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="hf: of a file of weights, e.g. 200MB; 5GB if not given.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="hf: copy this file beside the weights, e.g. config.json; may be repeated."),
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
    """Convert a checkpoint to one file, or its weights to a directory for from_pretrained(), checking every hash."""
    of_file = {"--format": file_format, "--allow-pickle": allow_pickle or None}
    of_hf = {"--rename": rename, "--dtype": dtype, "--max-shard-size": max_shard_size, "--file": file or None}
    _refuse_options(of_file if layout is ExportLayout.HF else of_hf, layout)
    (checkpoint,) = select_checkpoints(path, step)
    if layout is ExportLayout.HF:
        weights = _export_weights(
            checkpoint,
            out,
            keys=keys,
            strip_prefix=strip_prefix,
            rename=None if rename is None else read_rename(rename),
            dtype=dtype,
            max_shard_bytes=_bytes(max_shard_size or "5GB", "--max-shard-size"),
            sidecars=file or (),
            max_memory_bytes=_bytes(max_memory, "--max-memory"),
            force=force,
        )
        print_json(asdict(weights)) if as_json else _print_weights(weights)
        return
    result = run_export(
        checkpoint,
        out,
        keys=keys,
        strip_prefix=strip_prefix,
        file_format=None if file_format is None else file_format.value,
        max_memory_bytes=_bytes(max_memory, "--max-memory"),
        allow_pickle=allow_pickle,
        force=force,
    )
    print_json(asdict(result)) if as_json else _print(result)


def _refuse_options(options: dict[str, Any], layout: ExportLayout) -> None:
    """Raise if an option was given that the layout does not have."""
    from stager.workers.errors import UsageError

    for name, value in options.items():
        if value is not None:
            other = ExportLayout.FILE if layout is ExportLayout.HF else ExportLayout.HF
            raise UsageError(f"{name} is an option of --layout {other.value}, and the layout is {layout.value}")


def run_export(checkpoint: str, out: str, *, keys: list[str] | None, **options: Any) -> Exported:
    """Export with a progress bar.

    Args:
        keys, options: as of ``export_checkpoint()``.
    """
    from stager.exporting.export import export_checkpoint

    with _progress(checkpoint, keys) as advance:
        return export_checkpoint(checkpoint, out, keys=keys, progress=advance, **options)


def _export_weights(checkpoint: str, out: str, *, keys: list[str] | None, **options: Any) -> ExportedWeights:
    """Export with a progress bar. ``keys`` and ``options`` are those of ``export_weights()``."""
    from stager.exporting.weights import export_weights

    with _progress(checkpoint, keys) as advance:
        return export_weights(checkpoint, out, keys=keys, progress=advance, **options)


@contextmanager
def _progress(checkpoint: str, keys: list[str] | None) -> Iterator[Callable[[int], None]]:
    with byte_progress() as progress:
        # How large a part is stands in the manifest, which the export reads: without an end until then.
        total = directory_nbytes(checkpoint) if keys is None and os.path.isdir(checkpoint) else None
        bar = progress.add_task("export", total=total)
        yield partial(progress.advance, bar)


def _bytes(text: str, option: str) -> int:
    from stager.config.sizes import parse_bytes
    from stager.workers.errors import UsageError

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}; write bytes, or text such as 256MiB") from error


def _print(result: Exported) -> None:
    from stager.config.sizes import format_bytes

    facts = f"{result.num_tensors} tensors, {result.num_objects} objects, {format_bytes(result.nbytes)}"
    console = stdout()
    line = f"{printable(result.path)}: step {result.step}, {result.format}, {facts}, {result.secs:.2f} s"
    console.print(line, markup=False, soft_wrap=True)
    _print_left_out("because safetensors holds tensors only", result.left_out)


def _print_weights(result: ExportedWeights) -> None:
    from stager.config.sizes import format_bytes

    files = f"{len(result.files)} file{'s' if len(result.files) > 1 else ''} of weights"
    facts = f"{result.num_tensors} tensors, {format_bytes(result.nbytes)} in {files}"
    line = f"{printable(result.path)}: step {result.step}, {facts}, {result.secs:.2f} s"
    stdout().print(line, markup=False, soft_wrap=True)
    for other, name in result.tied.items():
        line = f"tied: {printable(other)} is stored as {printable(name)}"
        stdout().print(line, markup=False, soft_wrap=True)
    _print_left_out("because safetensors holds tensors only", result.left_out)
    _print_left_out("by --rename", result.renamed_away)


def _print_left_out(why: str, names: Sequence[str]) -> None:
    if names:
        shown = printable(first_of(names, _SHOWN_NAMES))
        stdout().print(f"left out, {why}: {shown}", markup=False, soft_wrap=True)
