"""The memory of staged results: one slab for each, leased until nothing refers to the result any more."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch

from stager.workers.device.host_memory import can_register
from stager.workers.errors import MemoryBudgetError
from stager.workers.memory import pages
from stager.workers.memory.buffer_pool import BufferPool
from stager.workers.memory.host_buffers import OWN_REGION_BYTES, HostBuffers, SharedSlice
from stager.workers.memory.slab import Slab

_ids = itertools.count(1)
_STEP_BYTES = OWN_REGION_BYTES  # sizes are multiples of it, so that a state that grows a little finds its slab again
_NO_LIMIT = 1 << 62  # of mappings: there is one for each result


class _Slabs(BufferPool):
    """A pool whose buffers own whole mappings, which workers map, too."""

    def dropped(self, storage: torch.UntypedStorage) -> None:
        pages.give_back(storage.data_ptr(), storage.nbytes())


class ResultMemory:
    """Leases slabs for results. See NOTE [ Leases ] in ``workers/memory/buffer_pool.py``. Not thread-safe.

    Args:
        max_bytes: how much memory all results may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pool = _Slabs(HostBuffers(shared=True, pinned=can_register(), fd_budget=_NO_LIMIT))
        self._slab_ids: WeakKeyDictionary[torch.UntypedStorage, str] = WeakKeyDictionary()

    def live_slabs(self) -> frozenset[str]:
        """Ids of the slabs that workers may keep mapped."""
        return frozenset(self._slab_ids.values())

    def lease(self, nbytes: int) -> tuple[Slab, bool]:
        """Return a slab that no result has, and whether its pages were written before. It is leased while it is held.

        Raises:
            MemoryBudgetError: results that are still held leave no room for it.
            OSError: no descriptor is left.
        """
        size = max(1, -(-nbytes // _STEP_BYTES)) * _STEP_BYTES
        self._pool.begin_pass()
        if not self._pool.has_free(size) and self._pool.nbytes + size > self._max_bytes:
            self._pool.drop_unleased()
            self._check_budget(size)
        memory = self._pool.take(size)
        is_warm = memory in self._slab_ids
        slab_id = self._slab_ids.setdefault(memory, f"result-{next(_ids)}")
        return Slab(slab_id, memory), is_warm

    def _check_budget(self, nbytes: int) -> None:
        held = self._pool.nbytes
        if held + nbytes > self._max_bytes:
            raise MemoryBudgetError(
                f"the staged state dict needs {nbytes:,} bytes of host memory, earlier results that are still held take "
                f"{held:,}, and arena.max_host_bytes allows {self._max_bytes:,}; drop or release() results, or raise "
                "arena.max_host_bytes"
            )

    def release(self, storages: Iterable[torch.UntypedStorage]) -> int:
        """End the leases of the slabs that these storages lie in; return how many were leased."""
        slabs = [storage.mapping for storage in storages if isinstance(storage, SharedSlice)]
        return self._pool.release({id(slab): slab for slab in slabs if slab is not None}.values())

    def close(self) -> None:
        """Give back what no result has. Results stay valid, and their memory is freed with them."""
        self._pool.close()
