"""Held sources: the memory of what is copied later stays until it is copied, whatever becomes of the tensors.

Copies read addresses. After ``param.data = other`` or ``param.set_(other)`` nothing else need refer to the memory at
them: it would be unmapped, and reading it would end the process. A reference to a tensor's storage holds it. It does not
hold it against ``storage.resize_()``, which frees the memory of a storage that is held, too. :meth:`HeldSources.lost`
finds that before and after the copy. Nothing in torch holds memory that is freed *while* it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stager.snapshot.picker import Picker, picker
from stager.state.placement import Copy

_Tensor: Any = torch.Tensor  # its methods are called unbound, which the stubs do not know
_Storage: Any = torch.UntypedStorage


@dataclass(frozen=True, slots=True)
class Sources:
    """Which leaves' memory some copies read; kept for as long as the copies stay the same.

    Attributes:
        copies: those that read an address.
        leaves_of: picks a state's leaves that they are made of.
        owners: for each copy, the position of its ``leaf`` among these.
        addresses: of each copy.
        on_devices: leaves of copies from devices.
    """

    copies: tuple[Copy, ...]
    leaves_of: Picker
    owners: Any
    addresses: Any
    on_devices: tuple[int, ...]

    @staticmethod
    def of(copies: Sequence[Copy]) -> Sources:
        """Note what these copies read."""
        leaves = tuple(dict.fromkeys(leaf for copy in copies for leaf in copy.leaves))
        positions = {leaf: position for position, leaf in enumerate(leaves)}
        reading = tuple(copy for copy in copies if not copy.is_packed and copy.nbytes)
        return Sources(
            copies=reading,
            leaves_of=picker(leaves),
            owners=np.array([positions[copy.leaf] for copy in reading], dtype=np.int64),
            addresses=np.array([copy.address for copy in reading], dtype=np.uint64),
            on_devices=tuple(copy.leaf for copy in copies if not copy.on_host),
        )

    def hold(self, leaves: Sequence[Any]) -> HeldSources:
        """Hold their memory from now on.

        Args:
            leaves: of the state.
        """
        if self.on_devices:  # torch copies these by their tensors, which must be those of now
            leaves = list(leaves)
            for leaf in self.on_devices:
                leaves[leaf] = leaves[leaf].detach()
        return HeldSources(self, leaves, list(map(_Tensor.untyped_storage, self.leaves_of(leaves))))


@dataclass(frozen=True, slots=True)
class HeldSources:
    """Memory that is held.

    Attributes:
        leaves: of the state; what torch copies by its tensor is the tensor of then.
        storages: of the leaves that the copies are made of.
    """

    sources: Sources
    leaves: Sequence[Any]
    storages: list[torch.UntypedStorage]

    def lost(self) -> set[int]:
        """Find the leaves whose memory was freed all the same, because their storage was resized."""
        starts = np.array(list(map(_Storage.data_ptr, self.storages)), dtype=np.uint64)
        ends = starts + np.array(list(map(_Storage.nbytes, self.storages)), dtype=np.uint64)
        owners, addresses = self.sources.owners, self.sources.addresses
        is_lost = (addresses < starts[owners]) | (addresses >= ends[owners])
        return {leaf for number in np.flatnonzero(is_lost).tolist() for leaf in self.sources.copies[number].leaves}
