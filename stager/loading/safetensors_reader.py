"""Reading ``.safetensors`` files, whoever wrote them. Nothing in them can run code, and they have no hashes to check.

The file is an 8-byte length, a JSON header and the raw bytes (github.com/huggingface/safetensors, "Format"). As there, names
are not nested, and bytes that belong to no tensor are an error. The header is compared with the size of the file before
memory is allocated for the tensors that it lists.

A model may lie in several files of one directory. Then a JSON file, ``model.safetensors.index.json``, has a ``weight_map``:
the file of each name (huggingface.co/docs/transformers, "Sharded checkpoints").
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NoReturn

import torch

from stager.loading.reading.plain_reader import PlainReader
from stager.state.shards import Box
from stager.workers.checkpoint.documents.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.formats.safetensors_format import DTYPES
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout
from stager.workers.checkpoint.layout.layout_check import check_file_name, check_layout, check_shape, check_text
from stager.workers.checkpoint.storage.posix.files import open_regular, read_small, storage_errors
from stager.workers.errors import CorruptCheckpointError, UsageError

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
INDEX_ENDING = ".safetensors.index.json"
"""How the name of an index ends."""

SHARD_BEGINNING = "shard-"
"""How the name of a file begins that has what one rank saved by ``HuggingFaceStorageWriter``."""

SHARD_ADVICE = (
    "has what one rank of several saved by HuggingFaceStorageWriter; load it by dcp.load() and HuggingFaceStorageReader, "
    "or save with enable_consolidation=True"
)

_SHARDING = "DCP_SHARDING_INFO"  # the key of that writer's entry in the metadata
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


class SafetensorsFiles:
    """See :class:`stager.loading.foreign_restore.ForeignCheckpoint`.

    ``safetensors.torch.save_model`` and stager write tied weights as names in the metadata; these share one tensor.

    Args:
        path: of a file, or of the index of several.
        num_threads: how many reads run at a time.
        manifest: what the files list, if it has been read; then ``path`` is a name for messages.

    Raises:
        CorruptCheckpointError, UsageError, StorageError
    """

    keeps_keys = False

    def __init__(self, path: str, num_threads: int, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = manifest_of(path) if manifest is None else manifest
        self._num_threads = num_threads

    def objects(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Return nothing: there are tensors only."""
        return {}

    def tensors(self, wanted: Sequence[tuple[int, Box | None]]) -> list[torch.Tensor]:
        """Read tensors into new memory. For a box, the rows are read that it is in, as all other ranks read theirs.

        Raises:
            CorruptCheckpointError, StorageError
        """
        rows = [self._rows(number, box) for number, box in wanted]
        read: dict[tuple[int, int, int], torch.Tensor] = {}  # tied tensors are read once
        for one in rows:
            if one not in read:
                read[one] = self._new(*one)
        ordered = sorted(read)
        with closing(PlainReader(os.path.dirname(self.path), self.manifest, self._num_threads)) as reader:
            starts = [self._row_nbytes(number) * first for number, first, _ in ordered]
            reader.read_parts([number for number, _, _ in ordered], starts, [read[one] for one in ordered])
        return [_narrowed(read[one], box) for one, (_, box) in zip(rows, wanted, strict=True)]

    def _rows(self, number: int, box: Box | None) -> tuple[int, int, int]:
        """Return the tensor, and the first row and the number of rows that a box is in."""
        shape = self.manifest.layout.items[number].shape
        if box is None or not shape:
            return number, 0, shape[0] if shape else 1
        return number, box.offsets[0], box.lengths[0]

    def _row_nbytes(self, number: int) -> int:
        item = self.manifest.layout.items[number]
        return item.data_nbytes // max(1, item.shape[0]) if item.shape else item.data_nbytes

    def _new(self, number: int, first: int, num_rows: int) -> torch.Tensor:
        item = self.manifest.layout.items[number]
        shape = (num_rows, *item.shape[1:]) if item.shape else ()
        return new_tensor(dtype_of(item.dtype), shape, item.stride, self._row_nbytes(number) * num_rows)


def _narrowed(rows: torch.Tensor, box: Box | None) -> torch.Tensor:
    """Return what a box has of the rows that it is in."""
    view = rows
    if box is not None:
        for dim, (offset, length) in enumerate(zip(box.offsets[1:], box.lengths[1:], strict=True), 1):
            view = view.narrow(dim, offset, length)
    return rows if view.shape == rows.shape else view.clone()


def manifest_of(path: str) -> Manifest:
    """Read what a file lists, or the index of several. See :func:`read_index` and :func:`read_header`."""
    return read_index(path) if path.endswith(INDEX_ENDING) else read_header(path)


def read_index(path: str) -> Manifest:
    """Read the index of several files and their headers, and return them as one manifest without hashes.

    Raises:
        CorruptCheckpointError: the index or a header is impossible, or they contradict each other.
        UsageError: a tensor has a dtype that stager does not know.
        StorageError
    """
    weights = weight_map(path)

    def refuse(name: str, first: str, second: str) -> NoReturn:
        raise CorruptCheckpointError(
            path,
            f"{name} is in two files, {first} and {second}, and the index does not say in which; "
            "download all files of the model again",
        )

    manifest = joined(os.path.dirname(path), sorted(set(weights.values())), weights, refuse)
    names = {str(key) for (key,), _ in manifest.paths()}
    if lost := [name for name in weights if name not in names]:
        raise CorruptCheckpointError(path, f"{lost[0]} is not in {weights[lost[0]]}, where the index says that it is")
    return manifest


def weight_map(path: str) -> dict[str, str]:
    """Read which file has each name from the index of several. All these files are there.

    Raises:
        CorruptCheckpointError: the index is impossible, or a file is missing.
        StorageError
    """
    with storage_errors("read", path):
        data = read_small(os.path.realpath(path))
    try:
        weights: dict[str, str] = json.loads(data, object_pairs_hook=_distinct)["weight_map"]
        for name, file in weights.items():
            check_file_name(check_text(file))
            check_text(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"is not the index of safetensors files: {error!r}") from error
    for file in sorted(set(weights.values())):
        if not os.path.lexists(os.path.realpath(os.path.join(os.path.dirname(path), file))):
            raise CorruptCheckpointError(
                path, f"names {file}, which is missing: copy or download all files of the model"
            )
    return weights


def joined(
    directory: str,
    file_names: Sequence[str],
    owners: Mapping[str, str],
    in_two: Callable[[str, str, str], object],
) -> Manifest:
    """Read the headers of several files of a directory, and return them as one manifest without hashes.

    Args:
        owners: the file of a name, for names that are in several files.
        in_two: called for any other name that is, with the name and both files. If it returns, the first one has it.

    Raises:
        CorruptCheckpointError: a header is impossible.
        UsageError: a tensor has a dtype that stager does not know.
        StorageError
    """
    files: list[FileSpec] = []
    items: list[Item] = []
    numbers: dict[str, int] = {}
    found: dict[str, str] = {}  # the file of each name
    for position, file in enumerate(file_names):
        # The Hugging Face hub's cache has a link in the place of each file.
        real = os.path.realpath(os.path.join(directory, file))
        one = read_header(real)
        for (key,), number in one.paths():
            name = str(key)
            if owners.get(name, file) != file:
                continue
            if (other := found.setdefault(name, file)) != file:
                in_two(name, other, file)
                continue
            numbers[name] = len(items) + number
        files += [FileSpec(os.path.join(os.path.dirname(real), spec.name), spec.nbytes) for spec in one.layout.files]
        items += [replace(item, file=position) for item in one.layout.items]
    layout = Layout(tuple(files), Items.of(items), ["dict", list(numbers), list(numbers.values())], 1)
    return Manifest(ManifestHeader("safetensors", 0, "", 0.0, "", ""), layout, (), ())


def read_header(path: str) -> Manifest:
    """Read the header, and return it as a manifest without hashes.

    Raises:
        CorruptCheckpointError: the header is impossible.
        UsageError: a tensor has a dtype that stager does not know.
        StorageError
    """
    data, size = _read_json(path)
    try:
        layout = _layout(json.loads(data, object_pairs_hook=_distinct), path, 8 + len(data), size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptCheckpointError(path, f"its safetensors header is not valid: {error}") from error
    return Manifest(ManifestHeader("safetensors", 0, "", 0.0, "", ""), layout, (), ())


def metadata_of(path: str) -> dict[str, Any]:
    """Read the metadata in the header of a file, which is not checked. Empty if there is none.

    Raises:
        CorruptCheckpointError: the file has no header of safetensors.
        StorageError
    """
    data, _ = _read_json(path)
    try:
        metadata = json.loads(data).get(_METADATA, {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"its safetensors header is not valid: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def _read_json(path: str) -> tuple[bytes, int]:
    """Return the JSON of a header, and the size of the file."""
    with storage_errors("read", path), open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 8 < 8 + length <= min(size, _LARGEST_HEADER_BYTES):
            raise CorruptCheckpointError(
                path, f"its first 8 bytes say that the header has {length} bytes, and the file has {size}"
            )
        return file.read(length), size


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"the name {twice} occurs twice")
    return result


def _layout(header: dict[str, Any], path: str, start: int, size: int) -> Layout:
    metadata = header.pop(_METADATA, None) or {}
    if _SHARDING in metadata and os.path.basename(path).startswith(SHARD_BEGINNING):
        raise UsageError(f"{path} {SHARD_ADVICE}")
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    items: list[Item] = []
    position, head = 0, start  # the header is the head of the first item
    for name, entry in entries:
        low, high = entry["data_offsets"]
        if low != position:
            raise ValueError(f"{name} begins at byte {low}, not at {position}")
        items.append(_item(name, entry, path, start + low - head, head, high - low))
        position, head = high, 0
    if start + position > size:
        raise CorruptCheckpointError(
            path,
            f"its header and tensors need {start + position} bytes, and it has only {size}: it is cut short, or its header "
            "is damaged; copy it again, or load another checkpoint",
        )
    if start + position != size:
        raise ValueError(f"the file has {size} bytes, and header and tensors take {start + position}")
    numbers = {name: number for number, (name, _) in enumerate(entries)}
    numbers |= {other: numbers[name] for other, name in metadata.items() if other not in numbers and name in numbers}
    layout = Layout((FileSpec("data", size),), Items.of(items), ["dict", list(numbers), list(numbers.values())], size)
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
