"""From a committed checkpoint back to a state: new containers, or in place into what is there.

match    every mismatch is found before anything is changed (match.py)
objects  read, unpickled under weights_only (unpickle.py), checked
tensors  straight into their targets, in parallel, each hash checked
apply    load_state_dict() of objects that have it, values put into containers
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from stager.loading.chunks import Place, places, with_wholes
from stager.loading.match import Match, match, refuse
from stager.loading.pickles.unpickle import unpickle
from stager.loading.selection import Selection
from stager.loading.sharded import fill_sharded
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.layout import Item
from stager.workers.checkpoint.layout.structure import build, describe, walk
from stager.workers.checkpoint.read.blob_reader import BlobReader, Wanted
from stager.workers.errors import CorruptCheckpointError, StorageError
from stager.workers.gc_pause import no_collection

_PARTLY = (
    "what it was loaded into is partly overwritten: load another checkpoint into it before it is used "
    "(loading.verify_first: true checks every hash before anything is changed)"
)

_Extent = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]  # start, end (addresses), item, shape, stride


class Restorer:
    """Restores from one checkpoint.

    Args:
        path, manifest: the checkpoint.
        num_threads: how many reads run at a time.
        allow_pickle: unpickle any object (runs code from the checkpoint).
        selection: restore only this part.
        rank: whose values those of ``PerRank`` are.

    Attributes:
        has_overwritten: reading into tensors that were there has begun. What is in them is good when ``load_into`` returns.
        has_read_all: every byte of the checkpoint's data was read, and had its hash.
    """

    def __init__(
        self,
        path: str,
        manifest: Manifest,
        num_threads: int,
        allow_pickle: bool,
        selection: Selection | None = None,
        rank: int = 0,
    ) -> None:
        self._rank = rank
        self._path = path
        self._stored = manifest
        wholes = with_wholes(manifest)
        self._manifest = wholes.manifest
        self._chunks = wholes.chunks
        self._items = self._manifest.layout.items
        self._num_threads = num_threads
        self._allow_pickle = allow_pickle
        self._selection = selection
        self.has_overwritten = False
        self.has_read_all = False

    def load(self) -> Any:
        """The whole state, or what is selected of it, in new memory.

        Raises:
            StateMismatchError: nothing is selected.
            CorruptCheckpointError, StorageError, UnsafePickleError
        """
        structure, selection = self._manifest.layout.structure, self._selection
        if selection is not None:
            structure = selection.of(structure, self._path)
        with no_collection():
            values = self._read(Match(wanted={index for _, index in walk(structure)}), others=selection is None)
        return build(structure, values.__getitem__)

    def load_into(self, target: MutableMapping[str, Any], strict: bool) -> None:
        """Restore the values that ``target`` names, in place.

        Tensors keep their identity and memory. Other values in containers are replaced. What is in the checkpoint under
        top-level names that ``target`` does not have is left alone.

        Raises:
            StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
            UnsafePickleError: nothing was changed.
            CorruptCheckpointError, StorageError: what was read up to there is in the tensors (``has_overwritten``).
        """
        with no_collection():
            found = match(self._manifest, self._path, target, strict, self._selection, self._rank)
            values = self._read(found)
        for step in found.steps:
            step(values)

    def _read(self, found: Match, others: bool = False) -> dict[int, Any]:
        """The values of the wanted items: the target tensors themselves where there are any, new ones elsewhere.

        Args:
            others: check the bytes of what nobody wants, too.
        """
        spread = {one.index: one.tensor for one in found.sharded}
        wanted = sorted((found.wanted - spread.keys()) | {index for index, _ in found.targets})
        shared = sharing_memory(found.targets)
        with BlobReader(self._path, self._stored, self._num_threads) as reader:
            objects = [index for index in wanted if self._items[index].kind == "object"]
            values = self._unpickle(self._read_blobs(reader, objects))
            refuse(self._path, [problem for check in found.checks if (problem := check(values)) is not None])
            direct = {
                index: tensor
                for index, tensor in reversed(found.targets)
                if index not in shared and _takes_bytes(self._items[index], tensor)
            }
            tensors = {i: direct[i] if i in direct else self._new(i) for i in wanted if i not in values}
            if others:
                unread = set(range(len(self._stored.layout.items))) - set(wanted) - self._chunk_items()
                reader.read([Wanted(index, None) for index in sorted(unread)])
            self.has_overwritten = bool(direct or spread)
            try:
                self._fill(reader, tensors)
                if spread:
                    fill_sharded(self._path, self._stored, reader, found.sharded)
            except CorruptCheckpointError as error:
                if self.has_overwritten:
                    raise CorruptCheckpointError(error.path, f"{error.problem}; {_PARTLY}") from error
                raise
            except StorageError as error:
                if self.has_overwritten:
                    raise StorageError(error.errno, f"{error.message}; {_PARTLY}", error.path) from error
                raise
        everything = range(len(self._stored.layout.items))
        self.has_read_all = others or (not self._chunks and not spread and set(everything) <= set(wanted))
        settle(tensors, found.targets)
        own = {index: tensor for index, tensor in reversed(found.targets) if index not in shared}
        return {**values, **tensors, **spread, **own}

    def _new(self, index: int) -> torch.Tensor:
        item = self._items[index]
        with self._enough_memory(index):
            return new_tensor(dtype_of(item.dtype), item.shape, item.stride, item.data_nbytes)

    @contextmanager
    def _enough_memory(self, index: int) -> Iterator[None]:
        """A file may be larger than memory, or have no more than a length."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch's for the same
            nbytes = self._items[index].data_nbytes
            name = next(describe(path) for path, leaf in self._manifest.paths() if leaf == index)
            raise StorageError(
                errno.ENOMEM, f"there is no memory for the {nbytes:,} bytes of {name}", self._path
            ) from error

    def _fill(self, reader: BlobReader, tensors: dict[int, torch.Tensor]) -> None:
        wanted = [Wanted(index, t.data_ptr()) for index, t in tensors.items() if index not in self._chunks]
        others: list[tuple[int, Place]] = []
        for index, chunks in self._chunks.items():
            if index in tensors:
                for place in places(tensors[index], chunks, self._items):
                    if place.takes_bytes:
                        wanted.append(Wanted(place.index, place.tensor.data_ptr()))
                    else:
                        others.append((index, place))
        reader.read(sorted(wanted, key=lambda one: one.index))
        with torch.no_grad():
            for index, place in others:
                with self._enough_memory(index):
                    place.fill(self._items[place.index], reader)

    def _chunk_items(self) -> set[int]:
        return {index for chunks in self._chunks.values() for _, index in chunks.parts}

    def _read_blobs(self, reader: BlobReader, indices: list[int]) -> dict[int, bytearray]:
        blobs = {}
        for index in indices:
            with self._enough_memory(index):
                blobs[index] = bytearray(self._items[index].nbytes)
        reader.read([Wanted(index, memoryview(blob)) for index, blob in blobs.items()])
        return blobs

    def _unpickle(self, blobs: dict[int, bytearray]) -> dict[int, Any]:
        names = {leaf: path for path, leaf in self._manifest.paths()} if blobs else {}
        return {
            index: unpickle(bytes(blob), describe(names[index]), self._path, self._allow_pickle)
            for index, blob in blobs.items()
        }


def settle(tensors: Mapping[int, torch.Tensor], targets: list[tuple[int, torch.Tensor]]) -> None:
    """Copy what was not read straight into its target."""
    written: list[torch.Tensor] = []
    with torch.no_grad():
        for index, target in targets:
            source = tensors[index]
            if target is source or (target.data_ptr() == source.data_ptr() and target.stride() == source.stride()):
                if not target.is_inference():  # those have no version
                    written.append(target)
            else:
                target.copy_(source)
    if written:
        torch.autograd.graph.increment_version(written)  # they were written behind autograd's back


def _takes_bytes(item: Item, tensor: torch.Tensor) -> bool:
    """Whether the raw bytes can go straight into the tensor's memory."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and (tensor.stride() == item.stride or tensor.numel() == 0)
    )


def sharing_memory(targets: list[tuple[int, torch.Tensor]]) -> set[int]:
    """Items whose targets overlap in memory with those of another item, or with another view of the same.

    Read in parallel they would tear each other, so they are copied in order instead: the last one wins, as when
    ``load_state_dict`` is given different values for weights that are tied here.
    """
    on_host = [(index, tensor) for index, tensor in targets if tensor.is_cpu and tensor.numel()]
    if _are_apart([tensor for _, tensor in on_host]):
        return set()
    extents = sorted({_extent(i, t) for i, t in on_host})
    shared: set[int] = set()
    furthest: _Extent | None = None
    for extent in extents:
        if furthest is not None and extent[0] < furthest[1]:
            shared.update((extent[2], furthest[2]))
        if furthest is None or extent[1] > furthest[1]:
            furthest = extent
    return shared


def _are_apart(tensors: list[torch.Tensor]) -> bool:
    """Whether no two of many tensors lie in the same stretch of memory; nearly always, and quickly told."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    nbytes = [t.nbytes if t.is_contiguous() else _nbytes_reached(t) for t in tensors]
    order = np.argsort(starts)
    ends = np.maximum.accumulate((starts + np.array(nbytes, np.uint64))[order])
    return bool((starts[order][1:] >= ends[:-1]).all())


def _nbytes_reached(tensor: torch.Tensor) -> int:
    """From the first byte of a tensor to the end of its last element."""
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _extent(index: int, tensor: torch.Tensor) -> _Extent:
    start = tensor.data_ptr()
    return start, start + _nbytes_reached(tensor), index, tuple(tensor.shape), tensor.stride()
