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

import torch

from stager.state.fingerprint import TensorMemory
from stager.state.placement import Copy

_Storage: Any = torch.UntypedStorage  # its methods are called unbound, which the stubs do not know


@dataclass(frozen=True, slots=True)
class Sources:
    """Which leaves' memory some copies read; kept for as long as the copies stay the same.

    Attributes:
        copies: those that read memory.
        owners: for each of them, the position of its ``leaf`` in ``TensorMemory``.
        on_devices: leaves of copies from devices.
        places: where the storages of the owners are, and how large. They stay as long as the copies do, because a plan holds
            only while each tensor has its address and its storage has its size.
    """

    copies: tuple[Copy, ...]
    owners: tuple[int, ...]
    on_devices: tuple[int, ...]
    places: tuple[list[int], list[int]]

    @staticmethod
    def of(copies: Sequence[Copy], memory: TensorMemory) -> Sources:
        """Note what these copies read. ``memory``: of the state that they are copies of, as it is now."""
        positions = {leaf: position for position, leaf in enumerate(memory.leaves)}
        reading = tuple(copy for copy in copies if copy.nbytes)
        owners = tuple(positions[copy.leaf] for copy in reading)
        return Sources(
            copies=reading,
            owners=owners,
            on_devices=tuple(copy.leaf for copy in copies if not copy.on_host),
            places=_places([memory.storages[owner] for owner in owners]),
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
        storages = [memory.storages[owner] for owner in self.owners]
        return HeldSources(self, leaves, storages)


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
        if now == self.sources.places:
            return set()
        found = zip(self.sources.copies, *now, *self.sources.places, strict=True)
        return {leaf for copy, a, b, c, d in found if (a, b) != (c, d) for leaf in copy.leaves}

    def leaves_at(self, address: int) -> set[int]:
        """Find the leaves whose copies read this address."""
        return {leaf for c in self.sources.copies if c.address <= address < c.address + c.nbytes for leaf in c.leaves}


def _places(storages: Sequence[torch.UntypedStorage]) -> tuple[list[int], list[int]]:
    return list(map(_Storage.data_ptr, storages)), list(map(_Storage.nbytes, storages))
