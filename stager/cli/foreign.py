"""``stager inspect`` of checkpoints that stager did not write."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stager.cli.entry import LeafEntry, entries_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


def is_foreign(path: str) -> bool:
    """Whether ``path`` is a file, or a directory of ``dcp.save`` or safetensors. A partial directory of stager is not."""
    if os.path.isfile(path):
        return True
    if ".partial-" in path or not os.path.isdir(path) or os.path.lexists(os.path.join(path, "manifest.json")):
        return False
    return any(name == ".metadata" or name.endswith(".safetensors") for name in os.listdir(path))


def inspect_foreign(path: str) -> tuple[dict[str, Any], list[LeafEntry]]:
    """Return facts about the checkpoint, and its entries. No data of a tensor is read.

    Raises:
        CorruptCheckpointError, UnsafePickleError, StorageError
    """
    from stager.loading.foreign_path import Origin, find

    origin, found = find(path)
    path = os.path.realpath(path)
    entries = {Origin.TORCH_SAVE: _of_file, Origin.SAFETENSORS: _of_safetensors}.get(origin, _of_dcp)(found)
    names = [path] if os.path.isfile(path) else sorted(os.path.join(path, name) for name in os.listdir(path))
    files = [{"name": os.path.basename(name), "nbytes": os.lstat(name).st_size} for name in names]
    return {
        "path": path,
        "format": origin.value,
        "nbytes": sum(file["nbytes"] for file in files if isinstance(file["nbytes"], int)),
        "num_tensors": sum(entry.kind == "tensor" for entry in entries),
        "num_objects": sum(entry.kind == "object" for entry in entries),
        "files": files,
    }, entries


def _of_file(path: str) -> list[LeafEntry]:
    import torch

    from stager.loading.foreign import load_torch_save
    from stager.state.flatten import flatten
    from stager.workers.checkpoint.layout.dtypes import name_of
    from stager.workers.checkpoint.layout.structure import fqn
    from stager.workers.errors import CorruptCheckpointError

    try:
        state = load_torch_save(path, allow_pickle=False, map_location="meta")
    except CorruptCheckpointError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        # torch checks the indices of sparse tensors, which the meta device does not have.
        state = load_torch_save(path, allow_pickle=False)
    flat = flatten(state if isinstance(state, dict) else {"": state})
    entries = []
    for keys, leaf in zip(flat.paths, flat.leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            dtype = name_of(leaf.dtype)
            nbytes = leaf.numel() * leaf.dtype.itemsize
            entries.append(LeafEntry(fqn(keys), "tensor", dtype, tuple(leaf.shape), nbytes, os.path.basename(path)))
        else:
            entries.append(LeafEntry(fqn(keys), "object", "", (), None, os.path.basename(path)))
    return entries


def _of_safetensors(path: str) -> list[LeafEntry]:
    from stager.loading.safetensors_reader import manifest_of

    return [replace(entry, file=os.path.basename(entry.file)) for entry in entries_of(manifest_of(path))]


def _of_dcp(path: str) -> list[LeafEntry]:
    from stager.loading.dcp.stock import StockReader

    return _entries(StockReader(path, allow_pickle=False).read_metadata())


def _entries(metadata: Metadata) -> list[LeafEntry]:
    """Make the entries. A tensor in chunks is one entry, with the place of its first chunk."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from stager.workers.checkpoint.layout.dtypes import name_of

    places: dict[str, Any] = {}
    for index, info in metadata.storage_data.items():
        places.setdefault(index.fqn, info)
    entries = []
    for name, described in metadata.state_dict_metadata.items():
        info = places.get(name)
        file, offset = (info.relative_path, info.offset) if info is not None else ("", None)
        if isinstance(described, TensorStorageMetadata):
            dtype, shape = described.properties.dtype, tuple(described.size)
            nbytes = described.size.numel() * dtype.itemsize
            entries.append(LeafEntry(name, "tensor", name_of(dtype), shape, nbytes, file, offset))
        else:
            entries.append(LeafEntry(name, "object", "", (), None if info is None else info.length, file, offset))
    return entries
