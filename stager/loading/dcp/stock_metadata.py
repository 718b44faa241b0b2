"""Reading ``.metadata`` of a checkpoint that ``dcp.save`` wrote without stager; the file may be hostile.

1. It is a pickle: its opcodes are checked (``pickle_check.py``).
2. An unpickler that knows only the classes of DCP's metadata loads it.
3. Every field is checked, and every size is compared with the files, because planners allocate memory for what the metadata
   lists before they read the first byte.

Format: torch.distributed.checkpoint.metadata and FileSystemWriter, torch 2.6 to 2.13.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stager.loading.pickles.pickle_check import check_pickle
from stager.workers.checkpoint.layout.layout_check import Box, check_count, check_shape, check_text, check_tiling
from stager.workers.checkpoint.layout.structure import fqn
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CorruptCheckpointError, UnsafePickleError, UsageError

_TIED = 2  # how many names may share the same bytes on average; each name takes memory of its own
_MAX_DEPTH = 256  # DCP walks a state by recursion
_MANY_PLACES = 1024  # positions in lists, in addition to a few for each name
_PLACES_PER_NAME = 4

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


def parse_stock_metadata(data: bytes, path: str) -> Metadata:
    """Return the checked content of ``.metadata``.

    Args:
        data: the bytes of the file.
        path: of the file; the files that it names are in the same directory.

    Raises:
        CorruptCheckpointError: it is damaged, or its fields contradict each other or the files.
        UnsafePickleError: loading it could run code.
        UsageError: it was written through a storage extension, so the sizes in files do not tell the sizes in memory.
        StorageError
    """
    try:
        check_pickle(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: could run code when loaded ({error}). If you trust its origin, use allow_pickle=True"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(path, f"is damaged: its content cannot be parsed ({error!r})") from error
    if type(metadata) is not Metadata:
        raise CorruptCheckpointError(path, "is not the .metadata of a torch.distributed.checkpoint")
    try:
        _check(metadata, os.path.dirname(path))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"contradicts itself or its files: {error}") from error
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        if (module, name) == (_METADATA, "_MEM_FORMAT_ENCODING"):
            return _memory_format
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise UnsafePickleError(f"{module}.{name} is not what dcp.save writes into a .metadata")


def _memory_format(value: object) -> _MEM_FORMAT_ENCODING:
    """Not the class itself: its members are the same for the whole process, and BUILD would change them."""
    return _MEM_FORMAT_ENCODING(value)


def _check(metadata: Metadata, directory: str) -> None:
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        raise ValueError(".metadata: state_dict_metadata or storage_data is not a mapping")
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta | None):
        raise ValueError("its storage_meta is not a StorageMeta")
    if not isinstance(metadata.planner_data, dict | None):
        raise ValueError("its planner_data is not a mapping")
    _check_paths(metadata.planner_data or {}, len(metadata.state_dict_metadata))
    sizes: dict[str, int] = {}
    lengths = {_key(index): _check_place(info, directory, sizes) for index, info in metadata.storage_data.items()}
    if sum(lengths.values()) > _TIED * sum(sizes.values()):
        raise ValueError("its values are together larger than its files")
    for key, nbytes in _needs(metadata):
        if lengths[key] < nbytes:
            raise ValueError(f"its value {key[0]} needs {nbytes} bytes, and has {lengths[key]} in its file")


def _check_paths(paths: dict[Any, Any], num_names: int) -> None:
    """Check the key paths. A list is made as long as its last position that has a name, so positions are limited."""
    lengths: dict[tuple[Any, ...], int] = {}  # of each list, by its path
    for name, path in paths.items():
        check_text(name)
        if type(path) is not tuple or not 0 < len(path) <= _MAX_DEPTH:
            raise ValueError(
                f"its planner_data has an entry that is not a key path of strings and integers: {str(path)[:60]}"
            )
        for position, key in enumerate(path):
            if type(key) is int and key >= 0:
                lengths[path[:position]] = max(lengths.get(path[:position], 0), key + 1)
            elif type(key) is not str:
                raise ValueError(
                    f"its planner_data has an entry that is not a key path of strings and integers: {str(path)[:60]}"
                )
        if fqn(path) != name:
            raise ValueError(
                f"its planner_data gives {name[:60]} the key path {str(path)[:60]}, which belongs to another name"
            )
    if sum(lengths.values()) > _MANY_PLACES + _PLACES_PER_NAME * num_names:
        raise ValueError("its planner_data has lists with many more positions than there are names")


def _key(index: Any) -> tuple[str, tuple[int, ...] | None]:
    if type(index) is not MetadataIndex:
        raise ValueError(f".metadata: storage_data has a key that is not a MetadataIndex: {str(index)[:60]}")
    return check_text(index.fqn), None if index.offset is None else _shape(index.offset)


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not torch.Size:
        raise ValueError(f"it has a size that is no torch.Size: {str(value)[:60]}")
    return check_shape(value)


def _check_place(info: Any, directory: str, sizes: dict[str, int]) -> int:
    """Check where a value lies, which must be in a file of this directory, and return its length in bytes."""
    if type(info) is not _StorageInfo:
        raise ValueError(f"its storage_data has a place that is no _StorageInfo: {str(info)[:60]}")
    name, start, nbytes = check_text(info.relative_path), check_count(info.offset), check_count(info.length)
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"a value lies outside of the checkpoint's directory: {name[:60]}")
    if getattr(info, "transform_descriptors", None):
        raise UsageError(
            f"{os.path.join(directory, name)} was written through a storage extension of DCP, for example "
            "compressed, so stager cannot know how much memory loading it takes, and refuses. If you trust its origin, pass "
            "allow_pickle=True: torch then reads it, without stager's checks"
        )
    if name not in sizes:
        sizes[name] = _size_of(os.path.join(directory, name))
    if start + nbytes > sizes[name]:
        raise ValueError(f"a value reaches beyond the end of {name}: to byte {start + nbytes} of {sizes[name]}")
    return nbytes


def _size_of(path: str) -> int:
    with storage_errors("open", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            problem = "is missing, and .metadata says that values of the checkpoint are in it; copy it there, too"
            raise CorruptCheckpointError(path, problem) from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    return found.st_size


def _needs(metadata: Metadata) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], int]]:
    """Yield the key of each value, and the least number of bytes that it takes in memory."""
    for name, value in metadata.state_dict_metadata.items():
        check_text(name)
        if type(value) is BytesStorageMetadata:
            yield (name, None), 0  # DCP allocates only what is in the file
            continue
        if type(value) is not TensorStorageMetadata or type(value.properties) is not TensorProperties:
            raise ValueError(f"{name} is neither a tensor nor an object")
        if not isinstance(value.properties.dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        boxes: list[Box] = []
        shape = _shape(value.size)
        for chunk in value.chunks:
            if type(chunk) is not ChunkStorageMetadata:
                raise ValueError(f"{name} has a chunk that is not a ChunkStorageMetadata")
            boxes.append((_shape(chunk.offsets), _shape(chunk.sizes)))
            if not _is_inside(boxes[-1], shape):
                raise ValueError(f"{name} has a chunk that reaches beyond the tensor")
            yield (name, boxes[-1][0]), math.prod(boxes[-1][1]) * value.properties.dtype.itemsize
        check_tiling(boxes, shape)


def _is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    offsets, lengths = box
    return len(offsets) == len(lengths) == len(shape) and all(
        start + length <= whole for start, length, whole in zip(offsets, lengths, shape, strict=True)
    )
