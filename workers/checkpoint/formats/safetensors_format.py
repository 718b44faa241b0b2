"""The ``safetensors`` format: tensors in files that ``safetensors.torch.load_file`` reads, objects beside them.

    state.safetensors                        or, of a large state, a file for each worker:
    state-00001-of-00002.safetensors ...     and state.safetensors.index.json, as on the Hugging Face Hub
    objects.bin                              what safetensors cannot hold: torch.save archives, one after the other

A file is an 8-byte length, a JSON header, and the raw bytes without a gap (github.com/huggingface/safetensors). The
file's header is the header of its first item. It depends on names, dtypes and shapes only, so every worker can compute it.
It is padded to 64 bytes, and tensors are sorted by element size, largest first, so that each tensor is aligned.

A tensor's name is its keys joined by dots. Of tied tensors the first name is stored; ``__metadata__`` maps the others to
it, as ``safetensors.torch.save_model`` does. Tensors are stored in C order. Tensors of dtypes that safetensors lacks are
stored as objects. Containers and the types of keys are in the manifest only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stager.workers.checkpoint.formats.contract import (
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpec,
    Trailer,
    no_trailer,
    tensor_item,
)
from stager.workers.checkpoint.layout.dtype_sizes import itemsize_of
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES, FileSpec, Item, Layout
from stager.workers.checkpoint.layout.plan_cache import Templates
from stager.workers.checkpoint.layout.structure import Chunks, leaves, names_of
from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

row_major = True
one_file = False
has_recipes = True
has_chunks = False

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_METADATA = "__metadata__"
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader


def holds(dtype: str) -> bool:
    """Return whether safetensors has this dtype."""
    return dtype in DTYPES


def object_file_name(rank: int) -> str:
    """Objects have a file of their own, which safetensors does not read."""
    return "objects.bin" if rank == 0 else f"objects-rank{rank:05d}.bin"


def lay_out(tensors: Sequence[TensorSpec], rank: int, split: Split) -> TensorLayout:
    """Put the tensors into files, in each by element size.

    Raises:
        UnstageableError: safetensors reserves a name or cannot store it, or one file would have too many tensors.
    """
    for spec in tensors:
        if _METADATA in spec.names:
            raise UnstageableError(spec.describe(), f"safetensors reserves the name {_METADATA}; rename this tensor")
        if not all(map(_is_text, spec.names)):
            raise UnstageableError(
                spec.describe(),
                "safetensors stores names as UTF-8, and this name is not valid Unicode; rename this tensor",
            )
    order = sorted(range(len(tensors)), key=lambda number: -itemsize_of(tensors[number].dtype))
    runs = split([tensors[number] for number in order], [tensors[number].nbytes for number in order])
    order = [order[number] for run in runs for number in sorted(run)]  # sorted within each file, too
    items: list[Item] = []
    files: list[FileSpec] = []
    for file, run in enumerate(runs):
        specs = [tensors[number] for number in order[len(items) : len(items) + len(run)]]
        head = len(header([(spec.names, spec.dtype, spec.shape) for spec in specs]))
        if head > _LARGEST_HEADER_BYTES:
            raise UnstageableError(
                specs[0].describe(),
                f"safetensors readers accept headers of {_LARGEST_HEADER_BYTES:,} bytes; {len(specs)} tensors need {head:,}",
            )
        offset = 0
        for spec in specs:
            items.append(tensor_item(spec, file, offset, head, spec.nbytes, 0))
            offset += head + spec.nbytes
            head = 0
        files.append(FileSpec(_file_name(rank, file, len(runs)), offset))
    return TensorLayout(order, tuple(items), tuple(files))


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _file_name(rank: int, file: int, count: int) -> str:
    stem = "state" if rank == 0 else f"state-rank{rank:05d}"
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{file + 1:05d}-of-{count:05d}.safetensors"


def header(tensors: Iterable[tuple[Sequence[str], str, tuple[int, ...]]]) -> bytes:
    """Make a file's header: its length, then JSON.

    Args:
        tensors: (every name, dtype, shape) of each tensor, in file order.
    """
    entries: dict[str, object] = {}
    tied: dict[str, str] = {}
    offset = 0
    for (name, *others), dtype, shape in tensors:
        nbytes = math.prod(shape) * itemsize_of(dtype)
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (offset, offset + nbytes)}
        tied.update(dict.fromkeys(others, name))
        offset += nbytes
    document = {_METADATA: {**tied, "format": "pt"}, **entries}
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-(8 + len(data)) % BLOB_ALIGN_BYTES)
    return struct.pack("<Q", len(data)) + data


def templates(tensors: Sequence[Item]) -> Templates:
    """None are needed: headers are JSON."""
    return {}


def headers_and_tails(layout: Layout) -> HeadersAndTails:
    """Give the first item of each file the file's header; no item has a tail."""
    headers: dict[int, bytes] = layout.cache.once_per_plan("safetensors headers", dict)  # by file

    def around(index: int) -> tuple[bytes, bytes]:
        item = layout.items[index]
        if item.kind != "tensor" or item.offset > 0:
            return b"", b""
        if item.file not in headers:
            headers[item.file] = header(_rows(layout, index))
        return headers[item.file], b""

    return around


def _rows(layout: Layout, first: int) -> Iterator[tuple[Sequence[str], str, tuple[int, ...]]]:
    """Iterate over (names, dtype, shape) of a file's tensors, from its first item, ``first``, on."""
    names = layout.cache.once_per_plan("names", lambda: _names(layout))
    file = layout.items[first].file
    for index, item in enumerate(layout.items[first:], first):
        if item.file != file:
            break
        yield names[index], item.dtype, item.shape


def _names(layout: Layout) -> dict[int, list[str]]:
    """Return the names of each item, in the order of the state."""
    found = list(leaves(layout.structure))
    names: dict[int, list[str]] = {}
    for (_, leaf), name in zip(found, names_of([path for path, _ in found]), strict=True):
        for index in [index for _, index in leaf.parts] if isinstance(leaf, Chunks) else (leaf,):
            names.setdefault(index, []).append(name)
    return names


def object_blob(value: object, leaf: int) -> PickledObject:
    """Pickle an object. A tensor is stored without the rest of its storage."""
    import torch

    from stager.workers.checkpoint.formats.object_pickle import pickle_object

    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta):
        value = value.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    return pickle_object(value, leaf)


def trailer(plan: LayoutPlan) -> Trailer:
    """None: a file of objects ends with the last of them."""
    return no_trailer


def index_files(layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
    """Make the index that says which file has which tensor, if there is more than one file."""
    names = [spec.name for spec in layout.files if spec.name.endswith(".safetensors")]
    if len(names) < 2:
        return {}
    names_by_item = _names(layout)
    tensors = [(i, item) for i, item in enumerate(layout.items) if item.kind == "tensor"]
    document = {
        "metadata": {"total_size": sum(item.data_nbytes for _, item in tensors)},
        "weight_map": {names_by_item[i][0]: layout.files[item.file].name for i, item in tensors},
    }
    stem = names[0].partition("-0")[0]
    return {f"{stem}.safetensors.index.json": json.dumps(document, indent=2).encode()}
