"""The files of exported weights: which tensors each has, and where; and the index of several.

    model.safetensors                      all of it, if it fits one file; or
    model-00001-of-00003.safetensors ...   files of at most so many bytes of tensors, in the order of the checkpoint, and
    model.safetensors.index.json           the file of each name

So ``save_pretrained`` of transformers writes them (huggingface.co/docs/transformers, "Sharded checkpoints"). In a file,
tensors are sorted by element size, so that each is aligned. The metadata of each file has ``format: pt``; the names that are
tied to another one, as ``safetensors.torch.save_model`` writes them; and all files of the export: see ``new_directory.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from stager.workers.checkpoint.formats.contract import TensorSpec
from stager.workers.checkpoint.formats.safetensors_format import check_names, header_of
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import itemsize_of

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that is exported.

    Attributes:
        number: of the tensor, in the source.
        spec: its names, dtype and shape in the file. The first name is kept, the others are tied to it.
    """

    number: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights.

    Attributes:
        name: of the file.
        header: its first bytes.
        weights: in the order of the file.
        items: where the bytes of each go.
        nbytes: of the file.
    """

    name: str
    header: bytes
    weights: tuple[Weight, ...]
    items: tuple[Item, ...]
    nbytes: int


def shards_of(weights: Sequence[Weight], most_bytes: int, others: Sequence[str], marker: str) -> list[Shard]:
    """Divide weights into files.

    Args:
        most_bytes: of the tensors of a file. A larger tensor has a file of its own.
        others: names of the files that are in the export beside these and their index.
        marker: the key under which the metadata lists all files of the export.

    Raises:
        UnstageableError: safetensors cannot store a name, or a file has too many tensors.
    """
    check_names([weight.spec for weight in weights])
    runs = _divided(weights, most_bytes)
    names = ["model.safetensors"]
    if len(runs) > 1:
        names = [f"model-{number:05d}-of-{len(runs):05d}.safetensors" for number in range(1, len(runs) + 1)]
    listed = [*names, *([INDEX_NAME] if len(runs) > 1 else []), *others]
    metadata = {marker: json.dumps(listed)}
    return [_shard(name, run, metadata) for name, run in zip(names, runs, strict=True)]


def index_of(shards: Sequence[Shard]) -> bytes:
    """Make the index of several files."""
    weight_map = {weight.spec.names[0]: shard.name for shard in shards for weight in shard.weights}
    document = {"metadata": {"total_size": total_nbytes(shards)}, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def total_nbytes(shards: Sequence[Shard]) -> int:
    """Return the number of bytes of all tensors."""
    return sum(item.data_nbytes for shard in shards for item in shard.items)


def _divided(weights: Sequence[Weight], most_bytes: int) -> list[list[Weight]]:
    runs: list[list[Weight]] = []
    large: list[list[Weight]] = []
    left_bytes = 0
    for weight in weights:
        nbytes = weight.spec.nbytes
        if nbytes > most_bytes:
            large.append([weight])
            continue
        if not runs or nbytes > left_bytes:
            runs.append([])
            left_bytes = most_bytes
        runs[-1].append(weight)
        left_bytes -= nbytes
    return runs + large


def _shard(name: str, weights: Sequence[Weight], metadata: dict[str, str]) -> Shard:
    ordered = sorted(weights, key=lambda weight: -itemsize_of(weight.spec.dtype))
    header = header_of([weight.spec for weight in ordered], metadata)
    items: list[Item] = []
    offset, head = 0, len(header)  # the header belongs to the first item
    for weight in ordered:
        items.append(weight.spec.item(0, offset, head))
        offset, head = offset + items[-1].nbytes, 0
    return Shard(name, header, tuple(ordered), tuple(items), offset)
