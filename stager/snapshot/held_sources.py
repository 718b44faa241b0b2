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

from stager.snapshot.picker import Picker, picker
from stager.state.copies import Copies, Copy
from stager.state.fingerprint import TensorMemory

_Storage: Any = torch.UntypedStorage  # its methods are called unbound, which the stubs do not know


@dataclass(frozen=True, slots=True)
class Sources:
    """Which leaves' memory some copies read; kept for as long as the copies stay the same.

    Attributes:
        copies: those that read memory.
        owners: picks the storage of each of them from those of a ``TensorMemory``.
        on_devices: leaves of copies from devices.
        places: where the storages of the owners are, and how large: see :func:`_places`. They stay as long as the copies do,
            because a plan holds only while each tensor has its address and its storage has its size.
    """

    copies: Copies
    owners: Picker
    on_devices: tuple[int, ...]
    places: Any

    @staticmethod
    def of(copies: Sequence[Copy], memory: TensorMemory) -> Sources:
        """Note what these copies read. ``memory``: of the state that they are copies of, as it is now."""
        copies = Copies.of(copies)
        owners = picker(
            np.searchsorted(np.array(memory.leaves, dtype=np.int64), copies.leaf).tolist()
        )  # they are sorted
        return Sources(
            copies=copies,
            owners=owners,
            on_devices=tuple(copies.leaf[~copies.on_host].tolist()),
            places=_places(owners(memory.storages)),
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
        return HeldSources(self, leaves, self.owners(memory.storages))


@dataclass(frozen=True, slots=True)
class HeldSources:
    """Memory that is held.

    Attributes:
        leaves: of the state; what torch copies by its tensor is the tensor as it was at ``save()``.
        storages: what is held, of each copy.
    """

    sources: Sources
    leaves: Sequence[Any]
    storages: Sequence[torch.UntypedStorage]

    def lost(self) -> set[int]:
        """Find the leaves whose memory was freed all the same, because their storage was resized, or moved.

        Not found is a storage that was resized, and then got the same size at the same address again.
        """
        now = _places(self.storages)
        return self._leaves_of((now != self.sources.places).any(axis=0))

    def leaves_at(self, address: int) -> set[int]:
        """Find the leaves whose copies read this address."""
        starts = self.sources.copies.address  # on the host: no memory of a device is found gone
        return self._leaves_of((starts <= address) & (address < starts + self.sources.copies.nbytes))

    def _leaves_of(self, chosen: Any) -> set[int]:
        return set(self.sources.copies.where(chosen).all_leaves()) if chosen.any() else set()


def _places(storages: Sequence[torch.UntypedStorage]) -> Any:
    """Return an array of two rows: the addresses of storages, and their sizes in bytes."""
    count = len(storages)
    return np.stack([np.fromiter(map(of, storages), np.uint64, count) for of in (_Storage.data_ptr, _Storage.nbytes)])
