"""``.metadata`` of a checkpoint that stager did not write, from a hostile file to a ``Metadata`` that can be worked with.

It is a pickle. It is read by an unpickler that knows the classes that DCP puts there and no others, after its opcodes were
checked (:mod:`stager.loading.pickles.pickle_check`). Then every field is checked, and every size against the files, because planners
take memory for what it says before they ask for the first byte.

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
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.layout.layout_check import Box, check_count, check_shape, check_text, check_tiling
from stager.workers.checkpoint.layout.structure import fqn
from stager.workers.errors import CorruptCheckpointError, UnsafePickleError, UsageError

_TIED = 2  # names for the same bytes, if it were all of them; each takes memory
_MAX_DEPTH = 256  # DCP walks through a state by recursion
_MANY_PLACES = 1024  # in lists; beside a few for each name
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
    """The checked content of ``.metadata``; its files are those beside ``path``.

    Raises:
        CorruptCheckpointError: it is damaged, or says something impossible.
        UnsafePickleError: loading it could run code.
        UsageError: it was written through a storage extension, so that lengths in files say nothing about memory.
        StorageError
    """
    try:
        check_pickle(data)
        metadata = _Unpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: could run code when loaded ({error}). If you trust where it comes from: allow_pickle=True"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from error
    if type(metadata) is not Metadata:
        raise CorruptCheckpointError(path, "is not the metadata of a checkpoint")
    try:
        _check(metadata, os.path.dirname(path))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"says something impossible: {error}") from error
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
        raise ValueError("no mapping of names")
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta | None):
        raise ValueError("its storage_meta is something else")
    if not isinstance(metadata.planner_data, dict | None):
        raise ValueError("its planner_data is something else")
    _check_paths(metadata.planner_data or {}, len(metadata.state_dict_metadata))
    sizes: dict[str, int] = {}
    lengths = {_key(index): _check_place(info, directory, sizes) for index, info in metadata.storage_data.items()}
    if sum(lengths.values()) > _TIED * sum(sizes.values()):
        raise ValueError("it has more data than its files hold")
    for key, nbytes in _needs(metadata):
        if lengths[key] < nbytes:
            raise ValueError(f"{key[0]} takes {nbytes} bytes, and {lengths[key]} are there")


def _check_paths(paths: dict[Any, Any], num_names: int) -> None:
    """A list is as long as the last place in it that has a name."""
    lengths: dict[tuple[Any, ...], int] = {}  # of each list, by its path
    for name, path in paths.items():
        check_text(name)
        if type(path) is not tuple or not 0 < len(path) <= _MAX_DEPTH:
            raise ValueError(f"not a path: {str(path)[:60]}")
        for position, key in enumerate(path):
            if type(key) is int and key >= 0:
                lengths[path[:position]] = max(lengths.get(path[:position], 0), key + 1)
            elif type(key) is not str:
                raise ValueError(f"not a path: {str(path)[:60]}")
        if fqn(path) != name:
            raise ValueError(f"{name[:60]} has a path that is another name's")
    if sum(lengths.values()) > _MANY_PLACES + _PLACES_PER_NAME * num_names:
        raise ValueError("its lists have many more places than there are names")


def _key(index: Any) -> tuple[str, tuple[int, ...] | None]:
    if type(index) is not MetadataIndex:
        raise ValueError(f"not the index of a value: {str(index)[:60]}")
    return check_text(index.fqn), None if index.offset is None else _shape(index.offset)


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not torch.Size:
        raise ValueError(f"not a size: {str(value)[:60]}")
    return check_shape(value)


def _check_place(info: Any, directory: str, sizes: dict[str, int]) -> int:
    """The length of a value's place in a file, which has to be a file of this directory."""
    if type(info) is not _StorageInfo:
        raise ValueError(f"not the place of a value: {str(info)[:60]}")
    name, start, nbytes = check_text(info.relative_path), check_count(info.offset), check_count(info.length)
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"its data is outside of it: {name[:60]}")
    if getattr(info, "transform_descriptors", None):
        raise UsageError(
            f"{os.path.join(directory, name)} was written through a storage extension of DCP, so that its length says "
            "nothing about memory; if you trust where it comes from: allow_pickle=True reads it as torch does"
        )
    if name not in sizes:
        sizes[name] = _size_of(os.path.join(directory, name))
    if start + nbytes > sizes[name]:
        raise ValueError(
            f"a value reaches beyond the end of {name}: {start + nbytes} bytes, and there are {sizes[name]}"
        )
    return nbytes


def _size_of(path: str) -> int:
    with storage_errors("open", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    return found.st_size


def _needs(metadata: Metadata) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], int]]:
    """Each value, and how many bytes it takes at least."""
    for name, value in metadata.state_dict_metadata.items():
        check_text(name)
        if type(value) is BytesStorageMetadata:
            yield (name, None), 0  # stock DCP does not ask for more than what is in the file
            continue
        if type(value) is not TensorStorageMetadata or type(value.properties) is not TensorProperties:
            raise ValueError(f"{name} is neither a tensor nor an object")
        if not isinstance(value.properties.dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        boxes: list[Box] = []
        shape = _shape(value.size)
        for chunk in value.chunks:
            if type(chunk) is not ChunkStorageMetadata:
                raise ValueError(f"{name} has a chunk that is none")
            boxes.append((_shape(chunk.offsets), _shape(chunk.sizes)))
            if not _is_inside(boxes[-1], shape):
                raise ValueError(f"{name} has a chunk that is not inside of it")
            yield (name, boxes[-1][0]), math.prod(boxes[-1][1]) * value.properties.dtype.itemsize
        check_tiling(boxes, shape)


def _is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    offsets, lengths = box
    return len(offsets) == len(lengths) == len(shape) and all(
        start + length <= whole for start, length, whole in zip(offsets, lengths, shape, strict=True)
    )
