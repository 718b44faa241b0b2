"""``manifest.json``: what a committed checkpoint consists of, to the byte.

Its presence under its final name is what makes a directory a checkpoint. It names every file with its size, every item
with its place, dtype, shape and hashes, and the structure of the state. Body of the sealed document
(:mod:`stager.workers.checkpoint.documents.envelope`), version 1:

    format "stager", version 1,
    name         of the directory, unless it is the default one of its step (``names.py``)
    order        [run, number]: a nonce of the trainer's, and how many saves it had begun
    kind "dcp" (the on-disk format of the items), step, save_id, created (unix seconds), torch, stager (versions that
    wrote it), segment_bytes,
    linked       [bytes of files that are hard links to an earlier checkpoint's, saves since one was written without links]
    files        [[name, nbytes], ...]                 data files, tiled by the items' spans
    index_files  [[name, nbytes, xxh3_128], ...]       .metadata, and the sidecars
    sidecars     [name, ...]                           which of the files have names that stager did not give them: index
                                                       files of ``save(files=...)``, and data files that another program
                                                       has named (``stager/integrations/torch_checkpointing.py``)
    stripes      [[offset, ...], ...]                  of each data file, where its stripes begin (in object stores only)
    columns      names of the columns of a row
    rows         [[kind, file, offset, nbytes, data_offset, data_nbytes, dtype, shape, stride, [xxh3_128, ...]], ...]
    structure    see :mod:`stager.workers.checkpoint.layout.structure`

A row's hashes cover its span in steps of segment_bytes. Reading the manifest checks that a checkpoint can be like that
(``layout_check``). Opening the data files compares their sizes (``blob_reader``).
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from operator import ge, sub
from typing import Any, TypeVar

from stager.workers.checkpoint.documents import metrics
from stager.workers.checkpoint.documents.envelope import seal_json, unseal
from stager.workers.checkpoint.documents.metrics import Metrics
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.layout.items import ROW_COLUMNS, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, num_segments
from stager.workers.checkpoint.layout.layout_check import (
    check_count,
    check_distinct,
    check_file_name,
    check_layout,
    check_sidecar_name,
    check_step,
    check_text,
    check_time,
    items_of_rows,
)
from stager.workers.checkpoint.layout.structure import Path, walk
from stager.workers.errors import CorruptCheckpointError
from stager.workers.gc_pause import no_collection

T = TypeVar("T")

MANIFEST_NAME = "manifest.json"
VERSION = 1
_COLUMNS = [*ROW_COLUMNS, "xxh3_128"]


@dataclass(frozen=True, slots=True)
class IndexFile(FileSpec):
    """A small file hashed as a whole."""

    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """The facts of a checkpoint that are not about a single item.

    Attributes:
        linked_bytes: of files that were hard links to an earlier checkpoint's when this one was committed.
        generation: 0: all of it was written by its own save; else one more than the checkpoint that it was linked to.
        metrics: as the user gave them to ``save()``.
        name: of the checkpoint's directory, when it was committed; "": the default one of its step.
        run, number: a nonce of the trainer's, and how many saves it had begun: of two of them, the later one counts.
        sidecars: names of the files that the user gave to ``save()``, and of data files that another program has named.
    """

    kind: str
    step: int
    save_id: str
    created: float
    torch: str
    stager: str
    linked_bytes: int = 0
    generation: int = 0
    metrics: Metrics = field(default_factory=dict, hash=False)
    name: str = ""
    run: str = ""
    number: int = 0
    sidecars: tuple[str, ...] = ()

    @property
    def final_name(self) -> str:
        """The name with which the checkpoint's directory was committed."""
        return self.name or checkpoint_name(self.step)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        hashes: for each item of the layout, the hashes of its segments, hex.
        index_files: small files, each hashed as a whole: those that readers of the format start from, and the sidecars.
        stripes: of each data file, where its stripes begin; (): each is kept in one piece.
    """

    header: ManifestHeader
    layout: Layout
    hashes: tuple[tuple[str, ...], ...]
    index_files: tuple[IndexFile, ...]
    stripes: tuple[tuple[int, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(f.nbytes for f in (*self.layout.files, *self.index_files))

    @property
    def file_names(self) -> set[str]:
        """Every file of the checkpoint, the manifest among them."""
        return {MANIFEST_NAME, *(f.name for f in (*self.layout.files, *self.index_files))}

    def paths(self) -> Iterable[tuple[Path, int]]:
        """Iterate over (key path, index of the item) of each leaf of the state."""
        return walk(self.layout.structure)

    def count(self, kind: str) -> int:
        """Return how many items of this kind there are."""
        items = self.layout.items
        return sum(items.kind.count(code) for code, of in enumerate(items.kinds) if of.kind == kind)

    def to_bytes(self) -> bytes:
        """Serialise the manifest, sealed."""
        facts = asdict(self.header)
        linked = [facts.pop("linked_bytes"), facts.pop("generation")]
        facts["metrics"] = metrics.encode(self.header.metrics)
        # What is not there is left out, so that an older version can read the manifest.
        name = {"name": name} if (name := facts.pop("name")) else {}
        order = facts.pop("run"), facts.pop("number")
        for optional in ("metrics", "sidecars"):
            if not facts[optional]:
                del facts[optional]
        head = _compact(
            {
                "format": "stager",  # what comes first here, ``run_directory.py`` reads without the rest
                "version": VERSION,
                **name,
                **({"order": order} if order[0] else {}),
                **facts,
                "segment_bytes": self.layout.segment_bytes,
                "linked": linked,
                "files": [[f.name, f.nbytes] for f in self.layout.files],
                "index_files": [astuple(f) for f in self.index_files],
                **({"stripes": self.stripes} if self.stripes else {}),
                "columns": _COLUMNS,
            }
        )
        structure = self.layout.cache.once_per_plan("structure", lambda: _compact(self.layout.structure))
        return seal_json(f'{head[:-1]},"rows":{_rows(self.layout, self.hashes)},"structure":{structure}}}'.encode())


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _rows(layout: Layout, hashes: Sequence[Sequence[str]]) -> str:
    """Serialise the rows as ``json.dumps`` would, but without a list per row.

    The text of a tensor's row is the same from save to save but for its hashes. It is kept with the plan.
    """
    num_fixed = layout.cache.num_fixed
    fixed = layout.cache.once_per_plan("rows", lambda: _texts(layout.items, slice(num_fixed)))
    texts = [*fixed, *_texts(layout.items, slice(num_fixed, None))]
    lists = _lists(hashes)
    if len(lists) != len(texts):
        raise ValueError(f"{len(lists)} items have hashes, and there are {len(texts)} items")
    # One join of texts and hashes in turn: a row's closing brackets stand at the head of the next one's text.
    pieces = [""] * (2 * len(texts))
    pieces[::2], pieces[1::2] = texts, lists
    rows = "".join(pieces)
    return f"[{rows[len(_CLOSE) + 1 :]}{_CLOSE}]" if rows else "[]"


def _lists(hashes: Sequence[Sequence[str]]) -> list[str]:
    """Serialise the lists of hashes, without brackets."""
    joined = list(map("".join, hashes))
    together = "".join(joined)
    if "" in joined or not together.isascii() or together.encode().translate(None, _ALPHANUMERIC):
        # Not hashes: whoever reads the manifest reports that.
        return [_compact(values)[1:-1] for values in hashes]
    if len(joined) == sum(map(len, hashes)):  # most items have one
        return [f'"{value}"' for value in joined]
    return ['"' + '","'.join(values) + '"' for values in hashes]


_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
_CLOSE = "]]"
"""What ends a row: the list of its hashes, and the row."""


@no_collection()
def _texts(items: Items, chosen: slice) -> list[str]:
    """Serialise the rows of some items up to their hashes, each with the end of the row before it at its head."""
    kinds = [(f'"{kind}"', _compact(others)[1:-1]) for kind, *others in items.kinds]  # a few
    *numbers, _ = [values[chosen] for values in items.columns()]  # all but the place in the slab
    return [
        f"{_CLOSE},[{kinds[code][0]},{file},{offset},{nbytes},{data_offset},{data_nbytes},{kinds[code][1]},["
        for code, file, offset, nbytes, data_offset, data_nbytes in zip(*numbers, strict=True)
    ]


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Parse and check a manifest.

    Args:
        path: for error messages.

    Raises:
        CorruptCheckpointError: it is damaged, or contradicts itself.
    """
    return _parsed(data, path, _parse_body)


def parse_header(data: bytes, path: str) -> ManifestHeader:
    """Parse the facts of a checkpoint, and nothing about its items. Raises as :func:`parse_manifest`."""
    return _parsed(data, path, _parse_header)


@no_collection()
def _parsed(data: bytes, path: str, parse: Callable[[dict[str, Any]], T]) -> T:
    body = unseal(data, path)
    if not isinstance(body, dict) or body.get("format") != "stager":
        raise CorruptCheckpointError(path, "not a stager manifest")
    if body.get("version") != VERSION:
        raise CorruptCheckpointError(
            path,
            f"manifest version {body.get('version')!r}, and this stager reads version {VERSION}: install a newer stager",
        )
    try:
        return parse(body)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(
            path, f"contradicts itself, or has a field of the wrong type: {error!r}"
        ) from error


def _parse_header(body: dict[str, Any]) -> ManifestHeader:
    linked_bytes, generation = body.get("linked", (0, 0))
    run, number = body.get("order", ("", 0))
    return ManifestHeader(
        **{name: check_text(body[name]) for name in ("kind", "save_id", "torch", "stager")},
        step=check_step(body["step"]),
        created=float(check_time(body["created"])),
        linked_bytes=check_count(linked_bytes),
        generation=check_count(generation),
        metrics=metrics.decode(body.get("metrics", {})),
        name=check_text(body.get("name", "")),
        run=check_text(run),
        number=check_count(number),
        sidecars=tuple(map(check_sidecar_name, body.get("sidecars", ()))),
    )


def _parse_body(body: dict[str, Any]) -> Manifest:
    if body["columns"] != _COLUMNS:
        raise ValueError("its items have columns that this version of stager does not know")
    header = _parse_header(body)
    index_files = tuple(_index_file(row, header.sidecars) for row in body["index_files"])
    items, lists = items_of_rows(body["rows"])
    layout = Layout(
        files=tuple(FileSpec(name, nbytes) for name, nbytes in body["files"]),
        items=items,
        structure=body["structure"],
        segment_bytes=body["segment_bytes"],
    )
    check_layout(layout)
    check_distinct([MANIFEST_NAME, *(f.name for f in (*layout.files, *index_files))])
    if not {file.name for file in (*index_files, *layout.files)}.issuperset(header.sidecars):
        raise ValueError("a sidecar is not among the files")
    hashes = tuple(map(tuple, lists))
    if set(map(type, itertools.chain.from_iterable(hashes))) - {str}:
        raise ValueError("a hash is not a string")
    _check_numbers_of_hashes(layout, hashes)
    return Manifest(header, layout, hashes, index_files, _stripes(body.get("stripes", ()), layout))


def _stripes(lists: Sequence[Sequence[Any]], layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Check the stripes: one list for each file, of offsets that begin at 0 and grow up to the file's size."""
    stripes = tuple(tuple(map(check_count, starts)) for starts in lists)
    if not stripes:
        return ()
    for starts, file in zip(stripes, layout.files, strict=True):
        ends = (*starts[1:], file.nbytes)
        if (starts and starts[0] != 0) or bool(starts) != bool(file.nbytes) or any(map(ge, starts, ends)):
            raise ValueError(f"the stripes of {file.name} do not make up the file")
    return stripes


def _index_file(row: Sequence[Any], sidecars: Sequence[str]) -> IndexFile:
    name, nbytes, digest = row
    check = check_sidecar_name if name in sidecars else check_file_name
    return IndexFile(check(name), check_count(nbytes), check_text(digest))


def _check_numbers_of_hashes(layout: Layout, hashes: Sequence[Sequence[str]]) -> None:
    """Check that each item has a hash for each of its segments."""
    spans = list(map(sub, layout.ends(), layout.starts()))
    if max(spans, default=0) <= layout.segment_bytes and set(map(len, hashes)) <= {1}:  # most checkpoints
        return
    for index, (of_item, nbytes) in enumerate(zip(hashes, spans, strict=True)):
        if len(of_item) != num_segments(nbytes, layout.segment_bytes):
            raise ValueError(f"item {index}: wrong number of hashes")
