"""Reading a ``.safetensors`` file, whoever wrote it. Nothing in it can run code, and it has no hashes to check.

The file is an 8-byte length, a JSON header and the raw bytes (github.com/huggingface/safetensors, "Format"). As there, names
are not nested, and bytes that belong to no tensor are an error. The header is compared with the size of the file before
memory is allocated for the tensors that it lists.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import closing
from typing import Any

import torch

from stager.loading.reading.plain_reader import PlainReader
from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.formats.safetensors_format import DTYPES
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout
from stager.workers.checkpoint.layout.layout_check import check_layout, check_shape, check_text
from stager.workers.checkpoint.read.blob_reader import Wanted
from stager.workers.errors import CorruptCheckpointError, UsageError
from stager.workers.memory.pages import bytes_at

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
_METADATA = "__metadata__"
_NAMES = {theirs: ours for ours, theirs in DTYPES.items()}


def is_safetensors(path: str) -> bool:
    """Whether the file begins as safetensors does: a length that the file has room for, then the brace of a JSON object.

    Raises:
        CorruptCheckpointError: not a regular file.
        StorageError
    """
    with storage_errors("read", path), open(open_regular(path), "rb") as file:
        head = file.read(9)
        size = os.fstat(file.fileno()).st_size
    return len(head) == 9 and head[8:] == b"{" and 8 + struct.unpack("<Q", head[:8])[0] <= size


def load_safetensors(path: str, num_threads: int) -> dict[str, torch.Tensor]:
    """Load the tensors by name, on the CPU.

    ``safetensors.torch.save_model`` and stager write tied weights as names in the metadata; these share one tensor.

    Raises:
        CorruptCheckpointError, UsageError, StorageError
    """
    manifest = read_header(path)
    items = manifest.layout.items
    tensors = [new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes) for item in items]
    views = [bytes_at(t.data_ptr(), item.data_nbytes) for t, item in zip(tensors, items, strict=True)]
    with closing(PlainReader(os.path.dirname(path), manifest, num_threads)) as reader:
        reader.read([Wanted(number, view) for number, view in enumerate(views)])
    return {str(name): tensors[number] for (name,), number in manifest.paths()}


def read_header(path: str) -> Manifest:
    """Read the header, and return it as a manifest without hashes.

    Raises:
        CorruptCheckpointError: the header is impossible.
        UsageError: a tensor has a dtype that stager does not know.
        StorageError
    """
    with storage_errors("read", path), open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 8 < 8 + length <= min(size, _LARGEST_HEADER_BYTES):
            raise CorruptCheckpointError(
                path, f"its first 8 bytes say that the header has {length} bytes, and the file has {size}"
            )
        data = file.read(length)
    try:
        layout = _layout(json.loads(data, object_pairs_hook=_distinct), path, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptCheckpointError(path, f"its safetensors header is not valid: {error}") from error
    return Manifest(ManifestHeader("safetensors", 0, "", 0.0, "", ""), layout, (), ())


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _layout(header: dict[str, Any], path: str, start: int, size: int) -> Layout:
    metadata = header.pop(_METADATA, None) or {}
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    items: list[Item] = []
    position, head = 0, start  # the header is the head of the first item
    for name, entry in entries:
        low, high = entry["data_offsets"]
        if low != position:
            raise ValueError(f"{name} begins at byte {low}, not at {position}")
        items.append(_item(name, entry, path, start + low - head, head, high - low))
        position, head = high, 0
    if start + position != size:
        raise ValueError(f"the file has {size} bytes, and header and tensors take {start + position}")
    numbers = {name: number for number, (name, _) in enumerate(entries)}
    numbers |= {other: numbers[name] for other, name in metadata.items() if other not in numbers and name in numbers}
    layout = Layout((FileSpec("data", size),), tuple(items), ["dict", list(numbers), list(numbers.values())], size)
    if items:
        check_layout(layout)
    return Layout((FileSpec(os.path.basename(path), size),), layout.items, layout.structure, size)


def _item(name: str, entry: dict[str, Any], path: str, offset: int, head: int, nbytes: int) -> Item:
    dtype = _NAMES.get(check_text(entry["dtype"]))
    if dtype is None:
        raise UsageError(f"{path}: {name} has the dtype {str(entry['dtype'])[:60]}, which stager cannot read")
    shape, stride = check_shape(entry["shape"]), [1]
    for length in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(1, length))
    return Item("tensor", 0, offset, head + nbytes, offset + head, nbytes, dtype, shape, tuple(stride[: len(shape)]))
