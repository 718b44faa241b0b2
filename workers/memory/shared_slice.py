"""A storage that is a range of a larger shared mapping, and says so.

torch knows only storages that own a whole mapping as shared, one file descriptor each, which is what makes 20,000
shared tensors fail with "too many open files". A :class:`SharedSlice` is a range of one mapping that many storages
live in: ``is_shared()`` is true, and torch.multiprocessing sends it as the mapping (one descriptor, however many slices
travel in the message) and a range. In the receiver it is a slice of the same memory.

Plain ``pickle`` and ``torch.save`` treat it as any storage and take its own bytes only.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_storage


class SharedSlice(torch.UntypedStorage):
    """Made by :func:`slice_shared` only. ``mapping`` keeps the memory; the slice never frees or resizes it."""

    mapping: torch.UntypedStorage | None = None
    offset: int = 0

    def is_shared(self) -> bool:
        return self.mapping is not None or super().is_shared()

    def share_memory_(self) -> SharedSlice:
        if self.mapping is None:
            super().share_memory_()
        return self

    def clone(self) -> torch.UntypedStorage:
        """A private copy, as ``copy.deepcopy`` and ``torch.clone`` expect it."""
        copied: torch.UntypedStorage = torch.UntypedStorage(self.nbytes(), device="cpu").copy_(self, False)
        return copied


def slice_shared(mapping: torch.UntypedStorage, offset: int, nbytes: int) -> SharedSlice:
    """``mapping[offset : offset + nbytes]`` as a shared storage (bytes)."""
    storage: Any = mapping[offset : offset + nbytes]
    # torch makes its own class; the layout is the same, and the object keeps its class and attributes while any
    # tensor uses the storage, because torch preserves a storage's Python object.
    storage.__class__ = SharedSlice
    storage.mapping = mapping
    storage.offset = offset
    sliced: SharedSlice = storage
    return sliced


def _reduce(storage: SharedSlice) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if storage.mapping is None:
        return reduce_storage(storage)  # type: ignore[no-any-return]  # a storage of its own: torch's way
    return slice_shared, (storage.mapping, storage.offset, storage.nbytes())


ForkingPickler.register(SharedSlice, _reduce)
