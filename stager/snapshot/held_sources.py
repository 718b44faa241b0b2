"""Held sources: the memory of what is copied later stays until it is copied, whatever becomes of the tensors.

Copies read addresses. After ``param.data = other`` or ``param.set_(other)`` nothing else need refer to the memory at
them: it would be unmapped, and reading it would end the process. A reference to a tensor's storage holds it. It does not
hold it against ``storage.resize_()``, which frees the memory of a storage that is held, too. :meth:`HeldSources.lost`
finds that; memory that is freed *while* it is copied is an error of the copy (``kernel_copies.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stager.state.fingerprint import TensorMemory
from stager.state.placement import Copy

_Storage: Any = torch.UntypedStorage  # its methods are called unbound, which the stubs do not know


@dataclass(frozen=True, slots=True)
class Sources:
    """Which leaves' memory some copies read; kept for as long as the copies stay the same.

    Attributes:
        copies: those that read an address.
        owners: for each copy, the position of its ``leaf`` in ``TensorMemory``.
        addresses: of each copy.
        on_devices: leaves of copies from devices.
    """

    copies: tuple[Copy, ...]
    owners: Any
    addresses: Any
    on_devices: tuple[int, ...]

    @staticmethod
    def of(copies: Sequence[Copy], leaves: Sequence[int]) -> Sources:
        """Note what these copies read. ``leaves``: of :class:`TensorMemory`."""
        positions = {leaf: position for position, leaf in enumerate(leaves)}
        reading = tuple(copy for copy in copies if not copy.is_packed and copy.nbytes)
        return Sources(
            copies=reading,
            owners=np.array([positions[copy.leaf] for copy in reading], dtype=np.int64),
            addresses=np.array([copy.address for copy in reading], dtype=np.uint64),
            on_devices=tuple(copy.leaf for copy in copies if not copy.on_host),
        )

    def hold(self, leaves: Sequence[Any], memory: TensorMemory) -> HeldSources:
        """Hold what they read.

        Args:
            leaves: of the state.
            memory: of the same state.
        """
        if self.on_devices:  # torch copies these by their tensors, which must be those of now
            leaves = list(leaves)
            for leaf in self.on_devices:
                leaves[leaf] = leaves[leaf].detach()
        return HeldSources(self, leaves, memory)


@dataclass(frozen=True, slots=True)
class HeldSources:
    """Memory that is held.

    Attributes:
        leaves: of the state; what torch copies by its tensor is the tensor as it was at ``save()``.
        memory: what is held.
    """

    sources: Sources
    leaves: Sequence[Any]
    memory: TensorMemory

    def lost(self) -> set[int]:
        """Find the leaves whose memory was freed all the same, because their storage was resized."""
        storages = self.memory.storages
        starts = np.array(list(map(_Storage.data_ptr, storages)), dtype=np.uint64)
        ends = starts + np.array(list(map(_Storage.nbytes, storages)), dtype=np.uint64)
        owners, addresses = self.sources.owners, self.sources.addresses
        is_lost = (addresses < starts[owners]) | (addresses >= ends[owners])
        return {leaf for number in np.flatnonzero(is_lost).tolist() for leaf in self.sources.copies[number].leaves}
