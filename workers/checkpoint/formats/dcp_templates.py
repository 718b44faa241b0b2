"""Templates of ``.metadata``, made from torch's own dataclasses; ``dcp_index.py`` fills them in, without torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from stager.workers.checkpoint.formats.dcp_index import chunk_name, index_name, tensor_name
from stager.workers.checkpoint.formats.pickle_template import TemplateMaker, mark, number_mark
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import Item
from stager.workers.checkpoint.layout.plan_cache import Templates


def index_templates(tensors: Sequence[Item]) -> Templates:
    """Make a template for each dtype and number of dimensions, and those that every ``.metadata`` needs."""
    kinds = {tensor_name(item): (item.dtype, len(item.shape)) for item in tensors}
    properties = {
        dtype: dcp_metadata.TensorProperties(dtype=dtype_of(dtype)) for dtype in {dtype for dtype, _ in kinds.values()}
    }
    maker = TemplateMaker(
        [
            *(_tensor_metadata(each, [1], [1]) for each in properties.values()),
            dcp_metadata.BytesStorageMetadata(),
            dcp_metadata.MetadataIndex("", torch.Size((0,))),
            _StorageInfo("", 0, 0),
        ]
    )
    templates = {"start": (maker.start, maker.first_string.to_bytes(4, "little")), **_of_the_whole(maker)}
    for name, (dtype, dims) in kinds.items():
        marks = [number_mark(number) for number in range(dims)]
        tensor = dcp_metadata.TensorStorageMetadata(properties[dtype], torch.Size(marks), mark(0))  # type: ignore[arg-type]  # for the list
        templates[name] = maker.template(tensor, [*marks, mark(0)])
    for dims in {dims for _, dims in kinds.values()}:
        marks = [number_mark(number) for number in range(2 * dims)]
        chunk = dcp_metadata.ChunkStorageMetadata(torch.Size(marks[:dims]), torch.Size(marks[dims:]))
        templates[chunk_name(dims)] = maker.template(chunk, marks)
        index = dcp_metadata.MetadataIndex(mark(0), torch.Size(marks[:dims]))
        templates[index_name(dims)] = maker.template(index, [mark(0), *marks[:dims]])
    return templates


def _of_the_whole(maker: TemplateMaker) -> dict[str, tuple[bytes, ...]]:
    marks = [mark(number) for number in range(5)]
    state, paths, storage, checkpoint_id, save_id = marks
    meta = dcp_metadata.StorageMeta(checkpoint_id=checkpoint_id, save_id=save_id)
    whole = dcp_metadata.Metadata(state, paths, storage, meta)  # type: ignore[arg-type]  # marks for dictionaries
    info = _StorageInfo(*marks[:3])  # type: ignore[arg-type]  # marks for numbers
    return {
        "metadata": maker.template(whole, marks),
        "storage info": maker.template(info, marks[:3]),
        "object": (maker.constant(dcp_metadata.BytesStorageMetadata()),),
        index_name(None): maker.template(dcp_metadata.MetadataIndex(mark(0)), [mark(0)]),
    }


def _tensor_metadata(
    properties: dcp_metadata.TensorProperties, shape: list[int], chunk_shape: list[int]
) -> dcp_metadata.TensorStorageMetadata:
    chunk = dcp_metadata.ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(chunk_shape))
    return dcp_metadata.TensorStorageMetadata(properties, torch.Size(shape), [chunk])
