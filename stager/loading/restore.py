"""From a committed checkpoint back to a state: new containers, or in place into what is there.

match    every mismatch is found before anything is changed (match.py)
objects  read, unpickled under weights_only (unpickle.py), checked
tensors  straight into their targets, in parallel, each hash checked
apply    load_state_dict() of objects that have it, values put into containers
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from stager.loading.chunks import fill, with_wholes
from stager.loading.match import Match, match, refuse
from stager.loading.unpickle import unpickle
from workers.blob_reader import BlobReader, Wanted
from workers.dtypes import dtype_of, new_tensor
from workers.layout import Item
from workers.manifest import Manifest
from workers.slab import bytes_at
from workers.structure import build, describe

_Extent = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]  # start, end (addresses), item, shape, stride


class Restorer:
    """Restores from one checkpoint.

    Args:
        path, manifest: the checkpoint.
        num_threads: how many reads run at a time.
        allow_pickle: unpickle any object (runs code from the checkpoint).
    """

    def __init__(self, path: str, manifest: Manifest, num_threads: int, allow_pickle: bool) -> None:
        self._path = path
        self._stored = manifest
        wholes = with_wholes(manifest)
        self._manifest = wholes.manifest
        self._chunks = wholes.chunks
        self._items = self._manifest.layout.items
        self._num_threads = num_threads
        self._allow_pickle = allow_pickle

    def load(self) -> Any:
        """The whole state, in new memory.

        Raises:
            CorruptCheckpointError, StorageError, UnsafePickleError
        """
        values = self._read(Match(wanted={index for _, index in self._manifest.paths()}))
        return build(self._manifest.layout.structure, values.__getitem__)

    def load_into(self, target: MutableMapping[str, Any], strict: bool) -> None:
        """Restore the values that ``target`` names, in place.

        Tensors keep their identity and memory. Other values in containers are replaced. What is in the checkpoint under
        top-level names that ``target`` does not have is left alone.

        Raises:
            StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
            UnsafePickleError: nothing was changed.
            CorruptCheckpointError, StorageError: what was read up to there is in the tensors, unless the checkpoint was
                verified in full before.
        """
        found = match(self._manifest, self._path, target, strict)
        values = self._read(found)
        for step in found.steps:
            step(values)

    def _read(self, found: Match) -> dict[int, Any]:
        """The values of the wanted items: the target tensors themselves where there are any, new ones elsewhere."""
        wanted = sorted(found.wanted)
        shared = sharing_memory(found.targets)
        with BlobReader(self._path, self._stored, self._num_threads) as reader:
            values = self._read_objects(reader, [index for index in wanted if self._items[index].kind == "object"])
            refuse(self._path, [problem for check in found.checks if (problem := check(values)) is not None])
            direct = {
                index: tensor
                for index, tensor in reversed(found.targets)
                if index not in shared and _takes_bytes(self._items[index], tensor)
            }
            tensors = {i: direct[i] if i in direct else _new(self._items[i]) for i in wanted if i not in values}
            stored = {i: t for i, t in tensors.items() if i not in self._chunks}
            reader.read([Wanted(i, bytes_at(t.data_ptr(), self._items[i].data_nbytes)) for i, t in stored.items()])
            with torch.no_grad():
                for index, chunks in self._chunks.items():
                    if index in tensors:
                        fill(tensors[index], chunks, self._items, reader)
        settle(tensors, found.targets)
        own = {index: tensor for index, tensor in reversed(found.targets) if index not in shared}
        return {**values, **tensors, **own}

    def _read_objects(self, reader: BlobReader, indices: list[int]) -> dict[int, Any]:
        blobs = {index: bytearray(self._items[index].nbytes) for index in indices}
        reader.read([Wanted(index, memoryview(blob)) for index, blob in blobs.items()])
        return {
            index: unpickle(bytes(blob), self._name(index), self._path, self._allow_pickle)
            for index, blob in blobs.items()
        }

    def _name(self, index: int) -> str:
        return next(describe(path) for path, leaf in self._manifest.paths() if leaf == index)


def settle(tensors: Mapping[int, torch.Tensor], targets: list[tuple[int, torch.Tensor]]) -> None:
    """Copy what was not read straight into its target."""
    with torch.no_grad():
        for index, target in targets:
            source = tensors[index]
            if target.data_ptr() == source.data_ptr() and target.stride() == source.stride():
                torch.autograd.graph.increment_version(target)  # it was written behind autograd's back
            else:
                target.copy_(source)


def _new(item: Item) -> torch.Tensor:
    return new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)


def _takes_bytes(item: Item, tensor: torch.Tensor) -> bool:
    """Whether the raw bytes can go straight into the tensor's memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and (tensor.stride() == item.stride or tensor.numel() == 0)
    )


def sharing_memory(targets: list[tuple[int, torch.Tensor]]) -> set[int]:
    """Items whose targets overlap in memory with those of another item, or with another view of the same.

    Read in parallel they would tear each other, so they are copied in order instead: the last one wins, as when
    ``load_state_dict`` is given different values for weights that are tied here.
    """
    extents = sorted({_extent(i, t) for i, t in targets if t.device.type == "cpu" and t.numel()})
    shared: set[int] = set()
    furthest: _Extent | None = None
    for extent in extents:
        if furthest is not None and extent[0] < furthest[1]:
            shared.update((extent[2], furthest[2]))
        if furthest is None or extent[1] > furthest[1]:
            furthest = extent
    return shared


def _extent(index: int, tensor: torch.Tensor) -> _Extent:
    shape, stride = tuple(tensor.shape), tensor.stride()
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size(), index, shape, stride
