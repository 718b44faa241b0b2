"""Restoring a committed checkpoint: as a new state, or in place into values that exist.

1. match    find every mismatch, and plan what goes where (match.py); nothing is changed yet
2. objects  read them, unpickle them under ``weights_only`` rules (unpickle.py), run the checks of the plan
3. tensors  read those whose targets share memory, and check that they agree; then read the others in parallel, straight into
            their targets where that is possible (on a device: device_fill.py), and check each hash
4. copy     the tensors that could not be read straight into their targets
5. apply    call ``load_state_dict()`` of objects that have it, put other values into their containers
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import is_
from typing import Any

import numpy as np
import torch

from stager.loading.chunks import Place, places, with_wholes
from stager.loading.extras import NO_OTHER_RANKS, OtherRanks
from stager.loading.loaded import Outcome
from stager.loading.match import match
from stager.loading.pickles.unpickle import unpickle
from stager.loading.reading.device_fill import fill_devices
from stager.loading.reading.direct_read import are_apart, has_memory_like, overlapping, takes_bytes, tell_autograd
from stager.loading.renaming import Renaming
from stager.loading.restore_plan import RestorePlan
from stager.loading.selection import Selection
from stager.loading.sharded import fill_sharded
from stager.loading.targets import Targets
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.checkpoint.layout.building import build, distinct
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_tensor
from stager.workers.checkpoint.layout.structure import describe, walk
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.device.accelerator import has_streams
from stager.workers.errors import CorruptCheckpointError, StorageError
from stager.workers.gc_pause import no_collection

_PARTLY_OVERWRITTEN = (
    "the target (what was given as into) is partly overwritten: load another checkpoint into it before you use it "
    "(loading.verify_first: true checks every hash before anything is changed)"
)


def _nothing() -> None:
    pass


class Restorer:
    """Restores one checkpoint.

    Args:
        path: the checkpoint's directory.
        manifest: of the checkpoint.
        num_threads: how many reads run at a time.
        allow_pickle: unpickle any object, which runs code from the checkpoint.
        selection: restore only this part.
        rank: selects the values of ``PerRank``.
        safe_globals: classes that may be unpickled, beside plain data.
        renaming: of the checkpoint's names.
        other_ranks: asked which names they have, and waited for before anything is changed.

    Attributes:
        outcome: the names that only the checkpoint or only the target has, once it is restored.
        has_overwritten: reading straight into tensors of the target has begun. They are whole when ``load_into`` returns.
        has_read_all: every byte of the checkpoint's data was read, and its hash was right.
    """

    def __init__(
        self,
        path: str,
        manifest: Manifest,
        num_threads: int,
        allow_pickle: bool,
        selection: Selection | None = None,
        rank: int = 0,
        safe_globals: Sequence[str] = (),
        renaming: Renaming = Renaming(),  # noqa: B008  # frozen
        other_ranks: OtherRanks = NO_OTHER_RANKS,
    ) -> None:
        self._renaming = renaming
        self._other_ranks = other_ranks
        self.outcome = Outcome()
        self._rank = rank
        self._safe_globals = safe_globals
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

    def restore(self, into: Any, strict: bool) -> Any:
        """Load into ``into`` and return it; without it, return a new state. See :meth:`load_into` and :meth:`load`."""
        if into is None:
            return self.load()
        self.load_into(into, strict)
        return into

    def load(self) -> Any:
        """Load the whole state, or the selected part of it, into new memory.

        Raises:
            StateMismatchError: nothing is selected.
            CorruptCheckpointError, StorageError, UnsafePickleError, UnloadableError
        """
        structure, selection = self._renaming.of(self._manifest.layout.structure, self._path), self._selection
        if selection is not None:
            structure = selection.of(structure, self._path)
        plan = RestorePlan(wanted={index for _, index in walk(structure)})
        with no_collection(), torch_defaults():
            values = self._read(plan, check_unwanted=selection is None)
            return build(structure, distinct(values.__getitem__))

    def load_into(self, target: Any, strict: bool) -> None:
        """Restore the values that ``target`` names, in place.

        Tensors keep their identity and memory. Plain containers become what the checkpoint has. Top-level names of the
        checkpoint that ``target`` does not have are ignored.

        Args:
            target: a mutable mapping of names to values; or one object with ``load_state_dict()``, which gets the one value
                of the checkpoint that fits it.
            strict: see :meth:`stager.Checkpointer.load`.

        Raises:
            StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
            UnsafePickleError: nothing was changed.
            UnloadableError: an object cannot be made, or its ``load_state_dict()`` raised; says what was restored.
            CorruptCheckpointError, StorageError: some tensors are overwritten if ``has_overwritten``.
        """
        with no_collection():
            plan = match(
                self._manifest,
                self._path,
                target,
                strict,
                self._selection,
                self._rank,
                self._renaming,
                self._other_ranks,
            )
            with torch_defaults():
                values = self._read(plan, before_change=self._other_ranks.wait_until_it_fits_all)
        plan.apply(values, self._path)
        self.outcome = plan.outcome()

    def _read(
        self, plan: RestorePlan, check_unwanted: bool = False, before_change: Callable[[], None] = _nothing
    ) -> dict[int, Any]:
        """Read the wanted items, and return them by number: a target tensor where there is one, else a new value.

        Args:
            check_unwanted: also read and check the bytes of items that are not wanted.
            before_change: called when all that can be checked was checked, before anything of the target is changed.
        """
        sharded = {one.index: one.tensor for one in plan.sharded}
        targets, kind_of = plan.targets, self._items.kind_of
        wanted = sorted((plan.wanted - sharded.keys()).union(targets.indices))
        shared = self._sharing_memory(targets)
        own = targets.first_of_each(shared)
        direct = own
        if not all(targets.is_direct):
            certain = {id(tensor) for tensor in compress(targets.tensors, targets.is_direct)}
            direct = {i: one for i, one in own.items() if id(one) in certain or takes_bytes(kind_of(i), one)}
        on_devices = {
            index: own[index]
            for index in own.keys() - direct.keys() - self._chunks.keys()
            if has_streams(own[index].device) and has_memory_like(kind_of(index), own[index])
        }
        stored = set(range(len(self._stored.layout.items)))
        with BlobReader(self._path, self._stored, self._num_threads) as reader:
            # Objects first: until the checks of the plan have passed, nothing of the target may change.
            is_object = [kind.kind == "object" for kind in self._items.kinds]
            objects = [index for index in wanted if is_object[self._items.kind[index]]]
            values = self._unpickle(self._read_blobs(reader, objects))
            plan.refuse_failed_checks(self._path, values)
            agreeing = self._new_tensors(sorted(shared))
            self._fill(reader, agreeing)
            plan.refuse_contradictions(self._path, agreeing)
            before_change()
            not_made = set().union(values, agreeing, on_devices, direct)
            tensors = direct | self._new_tensors(sorted(set(wanted) - not_made))
            if check_unwanted:
                unwanted = stored - set(wanted) - self._chunk_items()
                reader.read(sorted(unwanted))
            self.has_overwritten = bool(direct or sharded or on_devices)
            with self._telling_overwritten():
                self._fill(reader, tensors)
                fill_devices(reader, self._stored.layout.items, sorted(on_devices.items()))
                tensors |= agreeing | on_devices
                if sharded:
                    fill_sharded(self._path, self._stored, self._chunks, reader, plan.sharded)
        self.has_read_all = check_unwanted or (not self._chunks and not sharded and stored <= set(wanted))
        copy_to_targets(tensors, targets)
        return {**values, **tensors, **sharded, **own}

    def _sharing_memory(self, targets: Targets) -> set[int]:
        """Return the items whose targets share memory with another target, or in themselves."""
        if all(targets.is_direct):  # in most states; their items tell how long they are
            starts = np.array(list(map(torch.Tensor.data_ptr, targets.tensors)), np.uint64)
            if are_apart(starts, np.array(self._items.data_nbytes, np.uint64)[targets.indices]):
                return set()
        return overlapping(targets.indices, targets.tensors)

    @contextmanager
    def _telling_overwritten(self) -> Iterator[None]:
        """Add to errors that the target is partly overwritten, if it is."""
        try:
            yield
        except CorruptCheckpointError as error:
            if self.has_overwritten:
                raise CorruptCheckpointError(error.path, f"{error.problem}; {_PARTLY_OVERWRITTEN}") from error
            raise
        except StorageError as error:
            if self.has_overwritten:
                raise StorageError(error.errno, f"{error.message}; {_PARTLY_OVERWRITTEN}", error.path) from error
            raise

    def _new_tensors(self, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """Make tensors for items, by their indices."""
        items = self._items
        dtypes = {code: dtype_of(items.kinds[code].dtype) for code in {items.kind[index] for index in indices}}
        tensors: dict[int, torch.Tensor] = {}
        for index in indices:
            code = items.kind[index]
            _, _, shape, stride = items.kinds[code]
            try:
                tensors[index] = new_tensor(dtypes[code], shape, stride, items.data_nbytes[index])
            except (MemoryError, RuntimeError):
                with self._enough_memory(index):
                    raise
        return tensors

    @contextmanager
    def _enough_memory(self, index: int) -> Iterator[None]:
        """Turn a failed allocation into a StorageError: an item may be larger than memory, or claim to be."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # torch's allocator of host memory raises a plain RuntimeError.
            if type(error) is RuntimeError and "allocat" not in str(error):
                raise
            nbytes = self._items[index].data_nbytes
            name = next(describe(path) for path, leaf in self._manifest.paths() if leaf == index)
            raise StorageError(
                errno.ENOMEM, f"cannot allocate the {nbytes:,} bytes of memory that {name} needs", self._path
            ) from error

    def _fill(self, reader: BlobReader, tensors: dict[int, torch.Tensor]) -> None:
        stored = {index: t for index, t in tensors.items() if index not in self._chunks} if self._chunks else tensors
        indices, addresses = list(stored), list(map(torch.Tensor.data_ptr, stored.values()))
        others: list[tuple[int, Place]] = []
        for index, chunks in self._chunks.items():
            if index in tensors:
                for place in places(tensors[index], chunks, self._items):
                    if place.takes_bytes:
                        indices.append(place.index)
                        addresses.append(place.tensor.data_ptr())
                    else:
                        others.append((index, place))
        in_order = sorted(range(len(indices)), key=indices.__getitem__)
        reader.read([indices[k] for k in in_order], [addresses[k] for k in in_order])
        with torch.no_grad():
            for index, place in others:
                with self._enough_memory(index):
                    place.fill(self._items[place.index], reader)

    def _chunk_items(self) -> set[int]:
        return {index for chunks in self._chunks.values() for _, index in chunks.parts}

    def _read_blobs(self, reader: BlobReader, indices: list[int]) -> dict[int, io.BytesIO]:
        blobs = {}
        for index in indices:
            with self._enough_memory(index):
                blobs[index] = _stream_of(self._items[index].nbytes)
        reader.read(indices, [blob.getbuffer() for blob in blobs.values()])
        return blobs

    def _unpickle(self, blobs: dict[int, io.BytesIO]) -> dict[int, Any]:
        names = {leaf: path for path, leaf in self._manifest.paths()} if blobs else {}
        values = {}
        for index in list(blobs):
            blob = blobs.pop(index).getvalue()  # the stream's own bytes, not a copy; gone when the value is made
            values[index] = unpickle(blob, describe(names[index]), self._path, self._allow_pickle, self._safe_globals)
        return values


def _stream_of(nbytes: int) -> io.BytesIO:
    """Make a stream of so many bytes, which can be read into and then be had as ``bytes`` without a copy."""
    stream = io.BytesIO()
    if nbytes:
        stream.seek(nbytes - 1)
        stream.write(b"\0")
    return stream


def copy_to_targets(tensors: Mapping[int, torch.Tensor], targets: Targets) -> None:
    """Copy each tensor into its targets, unless it was read straight into them.

    Args:
        tensors: what was read, by item.
        targets: of the items.
    """
    if all(map(is_, map(tensors.get, targets.indices), targets.tensors)):  # most states
        tell_autograd(targets.tensors)
        return
    written: list[torch.Tensor] = []
    with torch.no_grad():
        for index, target in targets:
            source = tensors[index]
            if target is source or (target.data_ptr() == source.data_ptr() and target.stride() == source.stride()):
                written.append(target)
            else:
                target.copy_(source)
    tell_autograd(written)
