"""``stager inspect``: what is in a checkpoint. Only the manifest is read, and no code of the checkpoint runs."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.entry import LeafEntry, entries_of
from stager.cli.foreign import inspect_foreign, is_foreign
from stager.cli.ls import format_metrics, format_time
from stager.cli.options import JsonOption
from stager.cli.selection import select_checkpoints

if TYPE_CHECKING:
    from rich.table import Table

    from stager.workers.checkpoint.documents.manifest import Manifest


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the run's directory.")],
    *,
    step: Annotated[
        int | None, typer.Option(min=0, help="Which one in a run's directory; the newest otherwise.")
    ] = None,
    keys: Annotated[str | None, typer.Option(metavar="GLOB", help="Only these keys, e.g. 'model.*.weight'.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows that a table shows at most; 0: all.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: where it comes from, its files, each tensor and object. Also one of dcp.save, and a file
    of torch.save or safetensors."""
    facts, entries = inspect_foreign(path) if is_foreign(path) else _inspect_own(path, step)
    pattern = "*" if keys is None else keys.replace("[", "[[]")  # as in load(): a key may have brackets
    entries = [e for e in entries if fnmatch.fnmatchcase(e.key, pattern)]
    if as_json:
        parts = {kind: [asdict(e) for e in entries if e.kind == kind] for kind in ("tensor", "object")}
        print_json({**facts, "tensors": parts["tensor"], "objects": parts["object"]})
    else:
        _print(facts, entries, limit)
    if keys is not None and not entries:
        raise typer.Exit(1)


def _inspect_own(path: str, step: int | None) -> tuple[dict[str, Any], list[LeafEntry]]:
    from stager.workers.checkpoint.directory.manifest_file import read_manifest

    (checkpoint,) = select_checkpoints(path, step)
    manifest = read_manifest(checkpoint)
    return facts_of(checkpoint, manifest), list(entries_of(manifest))


def facts_of(path: str, manifest: Manifest) -> dict[str, Any]:
    """The facts about a checkpoint as a whole."""
    from stager.workers.checkpoint.documents import metrics

    header, layout = manifest.header, manifest.layout
    files = [{"name": f.name, "nbytes": f.nbytes} for f in layout.files]
    files += [{"name": f.name, "nbytes": f.nbytes} for f in manifest.index_files]
    return {
        "path": path,
        "step": header.step,
        "created": header.created,
        "format": header.kind,
        "nbytes": manifest.nbytes,
        "num_tensors": manifest.count("tensor"),
        "num_objects": manifest.count("object"),
        "save_id": header.save_id,
        "torch": header.torch,
        "stager": header.stager,
        **({"metrics": metrics.encode(header.metrics)} if header.metrics else {}),
        "files": files,
    }


def _print(facts: dict[str, Any], entries: list[LeafEntry], limit: int) -> None:
    from rich.table import Table

    from stager.config.sizes import format_bytes

    console = stdout()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    shown = {
        **facts,
        **({"created": format_time(facts["created"])} if "created" in facts else {}),
        "nbytes": f"{format_bytes(facts['nbytes'])} ({facts['nbytes']} bytes)",
        **({"metrics": format_metrics(facts["metrics"])} if "metrics" in facts else {}),
        "files": ", ".join(f"{file['name']} ({format_bytes(file['nbytes'])})" for file in facts["files"]),
    }
    for name, value in shown.items():
        table.add_row(name, _text(value))
    console.print(table)
    for kind in ("tensor", "object"):
        of_kind = [entry for entry in entries if entry.kind == kind]
        if of_kind:
            console.print()
            console.print(_entry_table(of_kind[: limit or None]))
        if limit and len(of_kind) > limit:
            more = len(of_kind) - limit
            console.print(f"... and {more} more {kind}s; narrow with --keys, or see all with --limit 0 or --json")
    if not entries:
        console.print("no key matches")


def _entry_table(entries: list[LeafEntry]) -> Table:
    """Make a table of entries of one kind; there is at least one."""
    from rich.table import Table

    tensors = entries[0].kind == "tensor"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(entries[0].kind, overflow="fold")
    for name in ("dtype", "shape") if tensors else ():
        table.add_column(name)
    table.add_column("bytes", justify="right")
    table.add_column("file")
    table.add_column("offset", justify="right")
    table.add_column("same bytes as", overflow="fold")
    for entry in entries:
        shape = "x".join(map(str, entry.shape)) or "scalar"
        of_tensor = (entry.dtype, shape) if tensors else ()
        cells = (entry.key, *of_tensor, entry.nbytes, entry.file, entry.offset, entry.same_as)
        table.add_row(*map(_text, cells))
    return table


def _text(value: object) -> Any:
    from rich.text import Text

    return Text("" if value is None else printable(value))
