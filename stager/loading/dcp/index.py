"""DCP's ``Metadata`` of a checkpoint, made from the manifest. The pickled ``.metadata`` is not read."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.structure import Chunks, is_recipe, leaves, names_of
from stager.workers.checkpoint.read.blob_reader import BlobReader


@dataclass(frozen=True, slots=True)
class Index:
    """A checkpoint as DCP's planners see it.

    Attributes:
        path: the checkpoint's directory.
        manifest: of the checkpoint.
        metadata: what the planners ask for.
        items: the item that each key of ``metadata.storage_data`` stands for.
    """

    path: str
    manifest: Manifest
    metadata: Metadata
    items: dict[MetadataIndex, int]


def read_index(path: str, load_id: str) -> Index:
    """Read the manifest of the checkpoint at ``path``, and make the index.

    Raises:
        CheckpointNotFoundError: there is no manifest.
        CorruptCheckpointError: it is damaged, or a file is missing or has another size.
    """
    manifest = read_manifest(path)
    # Planners allocate memory for all that the metadata lists before they read. So check the sizes of the files first.
    BlobReader(path, manifest, 1).close()
    index = index_of(path, manifest)
    index.metadata.storage_meta = StorageMeta(os.fspath(path), manifest.header.save_id, load_id)
    return index


def index_of(path: str, manifest: Manifest) -> Index:
    """Make the index of a checkpoint whose manifest was read."""
    metadata, items = _metadata(manifest.layout)
    return Index(path, manifest, metadata, items)


def _metadata(layout: Layout) -> tuple[Metadata, dict[MetadataIndex, int]]:
    metadata = Metadata({}, planner_data={}, storage_data={})
    items: dict[MetadataIndex, int] = {}
    names = names_of([path for path, _ in leaves(layout.structure)])
    for (path, leaf), name in zip(leaves(layout.structure, text_keys=True), names, strict=True):
        if is_recipe(path):  # stager's own: a planner would take it for an entry of its mapping
            continue
        metadata.planner_data[name] = path
        if isinstance(leaf, int) and layout.items[leaf].kind == "object":
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            items[MetadataIndex(name)] = leaf
            continue
        whole = leaf if isinstance(leaf, Chunks) else _in_one(leaf, layout)
        dtype = dtype_of(layout.items[whole.parts[0][1]].dtype)
        chunks = []
        for offsets, number in whole.parts:
            at = torch.Size(offsets)
            chunks.append(ChunkStorageMetadata(at, torch.Size(layout.items[number].shape)))
            items[MetadataIndex(name, at)] = number
        tensor = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(whole.shape), chunks)
        metadata.state_dict_metadata[name] = tensor
    metadata.storage_data = {index: _storage_info(layout, number) for index, number in items.items()}
    return metadata, items


def _in_one(number: int, layout: Layout) -> Chunks:
    shape = layout.items[number].shape
    return Chunks(shape, (((0,) * len(shape), number),))


def _storage_info(layout: Layout, number: int) -> _StorageInfo:
    item = layout.items[number]
    return _StorageInfo(layout.files[item.file].name, item.offset, item.nbytes)
