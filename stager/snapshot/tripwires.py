"""Tripwires: did anything write to guarded tensors while they were copied behind the trainer's back?

``guard()`` promises that only ``optimizer.step()`` writes to them. Programs break that promise, and do not know it: an
``nn.Embedding`` with ``max_norm`` writes in forward, an average of the weights is swapped in by ``param.data.copy_()``.

    1. Before ``save()`` returns, in the trainer's thread: each tensor's version is read, and a few samples of its bytes.
    2. The staging thread and the workers copy.
    3. Versions are read again: every write through torch counts it up, except one through ``.data``. And the samples are
       compared with the slab: what writes through ``.data`` or numpy writes whole tensors.

Samples are 16 bytes each, evenly spaced: one of a small tensor, up to 16 of a large one. They are gathered as small tensors
are (``batches.py``): many in one ``pwritev``. Device memory and packed copies have versions only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stager.state.placement import SMALL_BYTES, Copy
from stager.workers.checkpoint.directory.files import IOV_MAX
from stager.workers.errors import StorageError
from stager.workers.memory.slab import Slab

_SAMPLE_BYTES = 16
_MOST_SAMPLES = 16
_BYTES_PER_SAMPLE = 1 << 20

_Tensor: Any = torch.Tensor  # its methods and descriptors are called unbound, which the stubs do not know
_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_libc.pwritev.restype = ctypes.c_ssize_t


@dataclass(frozen=True, slots=True)
class Wires:
    """Where the tripwires of some copies are; kept for as long as the copies stay the same.

    Attributes:
        copies: what they watch.
        leaves: numbers of the leaves that the copies consist of.
        sampled: for each sample, the position of its copy in ``copies``.
        sources: address of each sample.
        offsets: where the slab has it.
        nbytes: length of each sample.
    """

    copies: tuple[Copy, ...]
    leaves: tuple[int, ...]
    sampled: Any
    sources: Any
    offsets: Any
    nbytes: Any

    @staticmethod
    def of(copies: Sequence[Copy]) -> Wires:
        """Choose the samples of these copies."""
        rows = [
            (number, copy.address + at, copy.slab_offset + at, min(_SAMPLE_BYTES, copy.nbytes))
            for number, copy in enumerate(copies)
            if copy.on_host and copy.address >= 0
            for at in _places(copy.nbytes)
        ]
        table = np.array(rows, dtype=np.uint64).reshape(len(rows), 4)
        leaves = tuple(leaf for copy in copies for leaf in copy.leaves)
        return Wires(tuple(copies), leaves, *(np.ascontiguousarray(table[:, column]) for column in range(4)))

    def arm(self, leaves: Sequence[Any]) -> Armed:
        """Read versions and samples now.

        Args:
            leaves: of the state.
        """
        return Armed(self, _versions([leaves[leaf] for leaf in self.leaves]), _gather(self.sources, self.nbytes))


@dataclass(frozen=True, slots=True)
class Armed:
    """Tripwires, and what was read before ``save()`` returned."""

    wires: Wires
    versions: list[int | None]
    samples: bytes

    def tripped(self, leaves: Sequence[Any], slab: Slab) -> list[int]:
        """List the leaves that were written to since, in order; call it when all copies are done."""
        wires = self.wires
        now = _versions([leaves[leaf] for leaf in wires.leaves])
        found = set()
        if now != self.versions:
            found = {leaf for leaf, a, b in zip(wires.leaves, now, self.versions, strict=True) if a != b}
        copied = _gather(wires.offsets + np.uint64(slab.address), wires.nbytes)
        if copied != self.samples:
            ends = np.cumsum(wires.nbytes).tolist()
            for number, end, length in zip(wires.sampled.tolist(), ends, wires.nbytes.tolist(), strict=True):
                if copied[end - length : end] != self.samples[end - length : end]:
                    found.update(wires.copies[number].leaves)
        return sorted(found)


def _places(nbytes: int) -> list[int]:
    """Return the offsets of a copy's samples."""
    last = nbytes - min(_SAMPLE_BYTES, nbytes)
    if nbytes <= SMALL_BYTES:
        return [last // 2]
    count = min(_MOST_SAMPLES, 2 + nbytes // _BYTES_PER_SAMPLE)
    return [last * number // (count - 1) for number in range(count)]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_Tensor._version.__get__, tensors))
    except RuntimeError:  # tensors that were made in inference mode have none
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _gather(addresses: Any, nbytes: Any) -> bytes:
    """Copy many small stretches of memory, one after the other."""
    total = int(nbytes.sum())
    if not total:
        return b""
    vectors = np.ascontiguousarray(np.stack((addresses, nbytes), axis=1))
    fd = os.memfd_create("stager-samples", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, total)
        position = 0
        for start in range(0, len(vectors), IOV_MAX):
            some = vectors[start : start + IOV_MAX]
            written = _libc.pwritev(fd, some.ctypes.data, len(some), position)
            if written != int(some[:, 1].sum()):
                raise StorageError(ctypes.get_errno(), "cannot sample the guarded tensors", "/dev/shm")
            position += written
        with mmap.mmap(fd, total, access=mmap.ACCESS_READ) as memory:
            return memory[:]
    finally:
        os.close(fd)
