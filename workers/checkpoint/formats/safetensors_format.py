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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from stager.workers.checkpoint.formats.contract import (
    Format,
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpec,
    TensorSpecs,
)
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES, FileSpec, Layout, itemsize_of
from stager.workers.checkpoint.layout.structure import Chunks, leaves, names_of
from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject

_PAIRS = (
    "bool=BOOL uint8=U8 uint16=U16 uint32=U32 uint64=U64 int8=I8 int16=I16 int32=I32 int64=I64 "
    "float8_e4m3fn=F8_E4M3 float8_e5m2=F8_E5M2 float16=F16 bfloat16=BF16 float32=F32 float64=F64 complex64=C64"
)
DTYPES = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in _PAIRS.split())}
_METADATA = "__metadata__"
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader


class SafetensorsFormat(Format):
    """See the head of this file."""

    row_major = True
    has_chunks = False

    def holds(self, dtype: str) -> bool:
        """Return whether safetensors has this dtype."""
        return dtype in DTYPES

    def object_file_name(self, rank: int) -> str:
        """Objects have a file of their own, which safetensors does not read."""
        return "objects.bin" if rank == 0 else f"objects-rank{rank:05d}.bin"

    def lay_out(self, tensors: TensorSpecs, rank: int, split: Split) -> TensorLayout:
        """Put the tensors into files, in each by element size.

        Raises:
            UnstageableError: safetensors reserves a name or cannot store it, or one file would have too many tensors.
        """
        specs = list(tensors)
        check_names(specs)
        order = sorted(range(len(tensors)), key=lambda number: -itemsize_of(specs[number].dtype))
        runs = split(TensorSpecs.of([specs[number] for number in order]), [specs[number].nbytes for number in order])
        order = [order[number] for run in runs for number in sorted(run)]  # sorted within each file, too
        items: list[Item] = []
        files: list[FileSpec] = []
        for file, run in enumerate(runs):
            in_file = [specs[number] for number in order[len(items) : len(items) + len(run)]]
            head, offset = len(header_of(in_file)), 0
            for spec in in_file:
                items.append(spec.item(file, offset, head))
                offset += items[-1].nbytes
                head = 0  # only the first item of a file has a header
            files.append(FileSpec(_file_name(rank, file, len(runs)), offset))
        return TensorLayout(order, Items.of(items), tuple(files))

    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
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

    def object_blob(self, value: object, leaf: int = 0) -> PickledObject:
        """Pickle an object. A tensor is stored without the rest of its storage."""
        import torch

        if type(value) is torch.Tensor and value.layout is torch.strided:
            if not (value.is_quantized or value.is_meta or value.is_nested):
                value = value.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
        return super().object_blob(value, leaf)

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
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


def check_names(tensors: Sequence[TensorSpec]) -> None:
    """Raise UnstageableError if safetensors cannot store a name."""
    for spec in tensors:
        if _METADATA in spec.names:
            raise UnstageableError(spec.describe(), f"safetensors reserves the name {_METADATA}; rename this tensor")
        if any("\ud800" <= character <= "\udfff" for name in spec.names for character in name):
            what = "safetensors stores names as UTF-8, and this name is not valid Unicode; rename this tensor"
            raise UnstageableError(spec.describe(), what)


def header_of(specs: Sequence[TensorSpec], metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Make the header of a file of these tensors. See :func:`header`.

    Raises:
        UnstageableError: readers would not accept it, because it is too long.
    """
    data = header(((spec.names, spec.dtype, spec.shape) for spec in specs), metadata)
    if len(data) > _LARGEST_HEADER_BYTES:
        raise UnstageableError(
            specs[0].describe(),
            f"safetensors readers accept headers of {_LARGEST_HEADER_BYTES:,} bytes; {len(specs)} tensors need "
            f"{len(data):,}",
        )
    return data


def _file_name(rank: int, file: int, count: int) -> str:
    stem = "state" if rank == 0 else f"state-rank{rank:05d}"
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{file + 1:05d}-of-{count:05d}.safetensors"


def header(
    tensors: Iterable[tuple[Sequence[str], str, tuple[int, ...]]], metadata: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Make a file's header: its length, then JSON.

    Args:
        tensors: (every name, dtype, shape) of each tensor, in file order.
        metadata: more entries beside the format and the names of tied tensors.
    """
    entries: dict[str, object] = {}
    tied: dict[str, str] = {}
    offset = 0
    for (name, *others), dtype, shape in tensors:
        nbytes = math.prod(shape) * itemsize_of(dtype)
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (offset, offset + nbytes)}
        tied.update(dict.fromkeys(others, name))
        offset += nbytes
    document = {_METADATA: {**tied, **metadata, "format": "pt"}, **entries}
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-(8 + len(data)) % BLOB_ALIGN_BYTES)
    return struct.pack("<Q", len(data)) + data


def _rows(layout: Layout, first: int) -> Iterator[tuple[Sequence[str], str, tuple[int, ...]]]:
    """Iterate over (names, dtype, shape) of a file's tensors, from its first item, ``first``, on."""
    names = _names(layout)
    file = layout.items[first].file
    for index, item in enumerate(layout.items[first:], first):
        if item.file != file:
            break
        yield names[index], item.dtype, item.shape


def _names(layout: Layout) -> dict[int, list[str]]:
    """Return the names of each item, in the order of the state."""

    def collect() -> dict[int, list[str]]:
        found = list(leaves(layout.structure))
        names: dict[int, list[str]] = {}
        for (_, leaf), name in zip(found, names_of([path for path, _ in found]), strict=True):
            for index in [index for _, index in leaf.parts] if isinstance(leaf, Chunks) else (leaf,):
                names.setdefault(index, []).append(name)
        return names

    return layout.cache.once_per_plan("names", collect)
