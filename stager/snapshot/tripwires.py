"""Tripwires: did anything write to guarded tensors while they were copied behind the trainer's back?

``guard()`` promises that only ``optimizer.step()`` writes to them. Programs break that promise, and do not know it: an
``nn.Embedding`` with ``max_norm`` writes in forward, an average of the weights is swapped in by ``param.data.copy_()``.

    1. Before ``save()`` returns, in the trainer's thread: read each tensor's version, and a few samples of its bytes.
    2. The staging thread and the workers copy.
    3. Read the samples again, in the slab and at the source: what writes through ``.data`` or numpy writes whole tensors.
    4. Wait until the trainer's thread has left the call that it is in.
    5. Read the versions again: every write through torch counts one up, except one through ``.data``.

A tensor that is given other memory (``param.data = average``) trips nothing: what is copied is the memory that it had at
``save()``, which is held (``held_sources.py``). ``set_()`` counts the version up, and trips.

Step 4 is before step 5 because torch counts a version up when an operation ends, not when it begins to write.

Versions are read of the state's leaves and of the optimizers' tensors, because not every two tensors over one memory share
their version. ``x.data`` has one of its own. So has the local tensor of a DTensor, or what another wrapper consists of, and
writes to the wrapper do not count that one up.

Samples are 16 bytes each, evenly spaced: one of a small tensor, up to 16 of a large one. In the trainer's thread numpy
gathers them, in a fifth of the time that the system call of ``kernel_copies.py`` takes. Device memory has versions only.
Packed copies have no samples either, so those from host memory are made before ``save()`` returns.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from stager.snapshot.guard import here
from stager.snapshot.held_sources import HeldSources, Sources
from stager.snapshot.kernel_copies import Scratch
from stager.snapshot.picker import Picker, picker
from stager.state.copies import SMALL_BYTES, Copies, Copy
from stager.state.fingerprint import TensorMemory
from stager.state.tensor_kinds import BLOCK, PLAIN_TENSORS
from stager.workers.gc_pause import no_collection
from stager.workers.memory.slab import Slab

_SAMPLE_BYTES = 16
_MOST_SAMPLES = 16
_BYTES_PER_SAMPLE = 1 << 20
_CALL_SECS = 0.25  # a write that goes on for longer after the copy writes whole tensors, and changes samples
_POLL_SECS = 0.001

_Tensor: Any = torch.Tensor  # its methods are called unbound, which the stubs do not know
_version, _layout, _nbytes = map(attrgetter, ("_version", "layout", "nbytes"))

Place = tuple[int, int]
"""Address and number of bytes of memory."""


class _Words:
    """This process's memory as numpy sees it: words of 1 or 8 bytes, from ``_FIRST`` to ``_END``."""

    def __init__(self, word_bytes: int) -> None:
        shape = ((_END - _FIRST) // word_bytes,)
        typestr = np.dtype(f"u{word_bytes}").str
        self.__array_interface__ = {"data": (_FIRST, True), "shape": shape, "typestr": typestr, "version": 3}


_FIRST = 1 << 12  # nothing is mapped below
_END = (
    1 << 56
)  # more than a program can address: 47 bits on x86-64, 48 or 52 on ARM, 56 with five levels of page tables
_BYTES = np.asarray(_Words(1))
_WORDS = np.asarray(_Words(8))


@dataclass(frozen=True, slots=True)
class _Samples:
    """Where samples are.

    Attributes:
        words: addresses of 8-byte words, divided by 8; in a slab, their offsets.
        bytes: addresses, or offsets, of single bytes.
    """

    words: Any
    bytes: Any

    def read(self, base: int = 0) -> Any:
        """Read all of them: an array of 8-byte words.

        Args:
            base: a slab's address.
        """
        in_words = _WORDS[self.words + np.int64((base - _FIRST) >> 3)]
        in_bytes = _BYTES[self.bytes + np.int64(base - _FIRST)]
        return np.concatenate((in_words, in_bytes.astype(np.uint64)))

    def read_what_may_go(self) -> Any:
        """Read all of them, from memory that another thread may free meanwhile.

        Raises:
            MemoryGoneError: it has.
        """
        num_bytes = 8 * len(self.words)
        vectors = np.empty((len(self.words) + len(self.bytes), 2), dtype=np.uint64)
        vectors[: len(self.words)] = np.stack((self.words << 3, np.full_like(self.words, 8)), axis=1)
        vectors[len(self.words) :] = np.stack((self.bytes, np.ones_like(self.bytes)), axis=1)
        with Scratch() as scratch:
            data = np.frombuffer(scratch.read(vectors), dtype=np.uint8)
        return np.concatenate((data[:num_bytes].view(np.uint64), data[num_bytes:].astype(np.uint64)))


@dataclass(frozen=True, slots=True)
class _Memory:
    """Where this rank's memory of some tensors is. A tensor may have several parts, and each part is one row.

    Attributes:
        tensors: number of the tensor.
        addresses, nbytes: of the part.
    """

    tensors: Sequence[int]
    addresses: list[int]
    nbytes: list[int]

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> _Memory:
        """Look at them now: each may have other memory later."""
        numbers: Sequence[int] = range(len(tensors))
        if not (PLAIN_TENSORS.issuperset(map(type, tensors)) and {torch.strided}.issuperset(map(_layout, tensors))):
            parts = [(n, part) for n in numbers for part in here(tensors[n]) if part.layout is torch.strided]
            numbers, tensors = [n for n, _ in parts], [part for _, part in parts]
        return _Memory(numbers, list(map(_Tensor.data_ptr, tensors)), list(map(_nbytes, tensors)))

    def places(self, tensors: set[int]) -> list[Place]:
        """Return the places of tensors of these numbers."""
        rows = zip(self.tensors, self.addresses, self.nbytes, strict=True)
        return [(address, nbytes) for tensor, address, nbytes in rows if tensor in tensors]


@dataclass(frozen=True, slots=True)
class Wires:
    """Where the tripwires of some copies are; kept for as long as the copies stay the same.

    Attributes:
        copies: what they watch.
        leaves: numbers of the leaves that the copies consist of.
        leaves_of: picks these of a state's leaves.
        memory: what the copies read.
        sources, targets: the samples, where the copies read them, and in the slab.
        owners: for each word of the samples, the position of its copy in ``copies``.
    """

    copies: Copies
    leaves: tuple[int, ...]
    leaves_of: Picker
    memory: Sources
    sources: _Samples
    targets: _Samples
    owners: Any

    @staticmethod
    def of(copies: Sequence[Copy], memory: TensorMemory) -> Wires:
        """Choose the samples of these copies. ``memory``: of the state that they are copies of."""
        copies = Copies.of(copies)
        watched = np.flatnonzero(copies.on_host & ~copies.is_packed)
        numbers, places = _places(copies.nbytes[watched])
        numbers = watched[numbers]
        address, offset, nbytes = (column[numbers] for column in (copies.address, copies.slab_offset, copies.nbytes))
        is_aligned = ((address | offset) % 8 == 0) & (nbytes >= _SAMPLE_BYTES)
        words = _words(numbers[is_aligned], places[is_aligned], nbytes[is_aligned], 8)
        others = _words(numbers[~is_aligned], places[~is_aligned], nbytes[~is_aligned], 1)
        leaves = tuple(copies.all_leaves())
        sources, targets = (
            _Samples((column[words[0]] + words[1]) >> 3, column[others[0]] + others[1])
            for column in (copies.address, copies.slab_offset)
        )
        return Wires(
            copies=copies,
            leaves=leaves,
            leaves_of=picker(leaves),
            memory=Sources.of(copies, memory),
            sources=sources,
            targets=targets,
            owners=np.concatenate((words[0], others[0])),
        )

    def arm(self, leaves: Sequence[Any], held_memory: TensorMemory, guarded: Sequence[torch.Tensor]) -> Armed:
        """Read versions and samples now, in the trainer's thread.

        Args:
            leaves: of the state.
            held_memory: of these leaves.
            guarded: the other tensors of the optimizers.
        """
        watched = [*self.leaves_of(leaves), *guarded]
        held = self.memory.hold(leaves, held_memory)
        memory, thread = _Memory.of(guarded), threading.get_ident()
        return Armed(self, held, watched, memory, thread, _versions(watched), self.sources.read())


@dataclass(frozen=True, slots=True)
class Armed:
    """Tripwires, and what was read before ``save()`` returned.

    Attributes:
        held: the memory that the copies read.
        watched: the tensors whose versions count: of each of ``wires.leaves``, then the optimizers'.
        memory: of the optimizers' tensors, as it was.
        thread: the trainer's.
    """

    wires: Wires
    held: HeldSources
    watched: list[torch.Tensor]
    memory: _Memory
    thread: int
    versions: list[int | None]
    samples: Any

    def tripped(self, slab: Slab) -> Tripped:
        """Find what was written to since; call it when all copies are done.

        Raises:
            MemoryGoneError: memory was freed while it was read.
        """
        wires = self.wires
        lost = self.held.lost()
        if lost:  # there is nothing at their addresses to read
            return Tripped(lost, [])
        now = wires.targets.read(slab.address), wires.sources.read_what_may_go()
        positions = {position for samples in now for position in wires.owners[samples != self.samples].tolist()}
        leaves = {leaf for position in positions for leaf in wires.copies[position].leaves}
        if not leaves:
            wait_until_call_is_left(self.thread, _CALL_SECS)
        changed = self._changed_versions()
        leaves.update(wires.leaves[number] for number in changed if number < len(wires.leaves))
        first = len(wires.leaves)
        return Tripped(leaves, self.memory.places({number - first for number in changed if number >= first}))

    def _changed_versions(self) -> list[int]:
        now = _versions(self.watched)
        if now == self.versions:
            return []
        return [number for number, (a, b) in enumerate(zip(now, self.versions, strict=True)) if a != b]


@dataclass(frozen=True, slots=True)
class Tripped:
    """What something else than a guarded step wrote to.

    Attributes:
        leaves: numbers of leaves.
        places: memory of the optimizers' tensors.
    """

    leaves: set[int]
    places: list[Place]


def _places(nbytes: Any) -> tuple[Any, Any]:
    """Choose where samples begin.

    Args:
        nbytes: of each copy; an array.

    Returns:
        For each sample, the position of its copy, and the offset in it.
    """
    last = nbytes - np.minimum(_SAMPLE_BYTES, nbytes)
    small = np.flatnonzero(nbytes <= SMALL_BYTES)
    numbers, places = [small], [last[small] // 2 & -8]
    for number in np.flatnonzero(nbytes > SMALL_BYTES).tolist():
        end, count = int(last[number]), min(_MOST_SAMPLES, 2 + int(nbytes[number]) // _BYTES_PER_SAMPLE)
        numbers.append(np.full(count, number))
        places.append(np.array([end * sample // (count - 1) & -8 for sample in range(count)]))
    return np.concatenate(numbers), np.concatenate(places)


def _words(numbers: Any, places: Any, nbytes: Any, step: int) -> tuple[Any, Any]:
    """Cut samples into words of ``step`` bytes.

    Args:
        numbers, places: see :func:`_places`; of some samples.
        nbytes: of their copies.

    Returns:
        For each word, the position of its copy, and the offset in it.
    """
    at = places[:, None] + np.arange(0, _SAMPLE_BYTES, step)
    inside = at < np.minimum(places + _SAMPLE_BYTES, nbytes)[:, None]
    return np.broadcast_to(numbers[:, None], at.shape)[inside], at[inside]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    versions: list[int | None] = []
    # In blocks, because one call does not let go of the interpreter, and the trainer may need it.
    for start in range(0, len(tensors), BLOCK):
        block = tensors[start : start + BLOCK]
        try:
            versions += map(_version, block)
        except RuntimeError:  # tensors that were made in inference mode have none
            del versions[start:]
            versions += [None if tensor.is_inference() else tensor._version for tensor in block]
    return versions


def wait_until_call_is_left(thread: int, secs: float) -> None:
    """Wait until a thread has left the call of C code that it is in now, if it is in one.

    A thread whose place in its Python code changes has left it. A thread that waits for a lock writes to no tensor. One
    that stays where it is for ``secs`` seconds most likely waits for something, too: for a batch, or for a backward pass.
    """
    before = _place(thread) if thread != threading.get_ident() else None
    deadline = time.monotonic() + secs
    while before is not None and before == _place(thread) and time.monotonic() < deadline:
        time.sleep(_POLL_SECS)


def _place(thread: int) -> tuple[int, int] | None:
    """Say where a thread is in its Python code; None: it has none, or it waits for a lock there."""
    # A collection in there hangs the process for ever where it lets a thread run that begins or ends: CPython's gh-106883,
    # seen with 3.11.7.
    with no_collection():
        frame = sys._current_frames().get(thread)
    if frame is None or frame.f_code.co_filename == threading.__file__:
        return None
    return id(frame), frame.f_lasti
