"""Checkpoints that stager did not write: read by torch's own reader, within stager's rules for pickles.

``.metadata`` is a pickle. It is read by an unpickler that knows the classes that DCP puts there and no others. An object of
the state is read under ``weights_only`` rules before a planner, which unpickles anything, gets to see it.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from stager.loading.unpickle import unpickle
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafePickleError
from workers.files import read_small, storage_errors

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
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise UnsafePickleError(f"{module}.{name} is not what dcp.save writes into a .metadata")


class StockReader:
    """One checkpoint.

    Args:
        path: its directory.
        allow_pickle: unpickle anything (runs code from the checkpoint).
    """

    def __init__(self, path: str, allow_pickle: bool) -> None:
        self._path = path
        self._allow_pickle = allow_pickle
        self._reader = FileSystemReader(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As ``FileSystemReader.read_metadata``.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, UnsafePickleError
        """
        rank = kwargs.get("rank")
        path = os.path.join(self._path, ".metadata" if rank is None else f"__{rank}.metadata")
        with storage_errors("read", path):
            try:
                data = read_small(path)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise CheckpointNotFoundError(
                    error.errno, "not a checkpoint: no manifest, no .metadata", path
                ) from error
        if self._allow_pickle:
            return self._reader.read_metadata(*args, **kwargs)
        metadata = _unpickle_metadata(data, path)
        metadata.storage_meta = getattr(metadata, "storage_meta", None)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner, metadata: Metadata) -> Future[None]:
        """As ``FileSystemReader.read_data``.

        Raises:
            CorruptCheckpointError, UnsafePickleError
        """
        for info in {id(info): info for info in (metadata.storage_data or {}).values()}.values():
            if os.path.basename(info.relative_path) != info.relative_path:
                raise CorruptCheckpointError(self._path, f"its data is outside of it: {info.relative_path}")
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        guarded = planner if self._allow_pickle else cast(LoadPlanner, _GuardedPlanner(planner, self._path))
        return self._reader.read_data(plan, guarded)


def _unpickle_metadata(data: bytes, path: str) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path}: could run code when loaded ({error}). If you trust where it comes from: allow_pickle=True"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CorruptCheckpointError(path, "is not the metadata of a checkpoint")
    return metadata


class _GuardedPlanner:
    """What a reader asks of a planner; objects are let through when ``weights_only`` rules allow them."""

    def __init__(self, planner: LoadPlanner, path: str) -> None:
        self._path = path
        self._load_bytes = planner.load_bytes
        self.resolve_tensor = planner.resolve_tensor
        self.commit_tensor = planner.commit_tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        unpickle(value.getvalue(), read_item.dest_index.fqn, self._path, allow_pickle=False)
        value.seek(0)
        self._load_bytes(read_item, value)
