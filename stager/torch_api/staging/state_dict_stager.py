"""``StateDictStager``: torch's name and signatures over the deep copy with offload.

NOTE [ The cache, and what it means ]
The default keeps torch's behaviour: each source storage has one CPU storage as long as it lives. A second ``stage()`` of
the same source copies into the same CPU storage. That is fast and takes no new memory, but **the result of the first**
``stage()`` **changes while someone may still read it**. Wait for the first save before staging again, or use leases
(``lease=True``): then each result owns its buffers until it is dropped or released (NOTE [ Leases ] in
``workers/memory/buffer_pool.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from stager.workers.device import accelerator
from stager.workers.memory.buffer_pool import BufferPool
from stager.workers.memory.host_buffers import HostBuffers
from stager.workers.offload.copier import OffloadCopier
from stager.workers.offload.hook_memo import reachable_leaves


class _CachedStorages:
    """Stages into one CPU storage for each living source storage."""

    def __init__(self, buffers: HostBuffers) -> None:
        self._buffers = buffers
        self.mapping = WeakIdKeyDictionary()

    def begin_pass(self) -> None:
        """Do nothing: no lease can have ended."""

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        """Copy a storage to the CPU; return the copy. With ``non_blocking`` it may still run: the caller synchronises."""
        cached: torch.UntypedStorage | None = self.mapping.get(storage)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if cached is None or cached.nbytes() != storage.nbytes():  # or the source was resized in place
            cached = self._buffers.new(storage.nbytes())
            self.mapping[storage] = cached
        cached.copy_(storage, non_blocking)
        return cached

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of all CPU storages that are page-locked."""
        cached: Iterable[torch.UntypedStorage] = self.mapping.values()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return sum(self._buffers.pinned_of(storage.nbytes()) for storage in cached)

    def release(self, storages: Iterable[torch.UntypedStorage]) -> int:
        """Do nothing: results own no storages."""
        return 0

    def close(self) -> None:
        """Forget the CPU storages."""
        self.mapping.clear()
        self._buffers.drop()


class _LeasedStorages(BufferPool):
    """Stages into CPU storages that belong to the result."""

    mapping = WeakIdKeyDictionary()  # stays empty: leases are not cached by source

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        """Copy a storage to the CPU; return the copy. With ``non_blocking`` it may still run: the caller synchronises."""
        leased = self.take(storage.nbytes())
        leased.copy_(storage, non_blocking)
        return leased


class StateDictStager(OffloadCopier):
    """Deep copies of state dicts with every tensor on the CPU, in private, shared or pinned memory.

    Not thread-safe: one ``stage()`` at a time.

    ``share_memory=True`` has these costs. The first copy of each storage goes into new memory and takes two to four times
    as long as later ones (docs/staging-api.md). Storages below 1 MiB share mappings of at least 4 MiB, and a mapping is
    kept until its last storage is dropped. Each mapping takes a file descriptor, and so does each larger storage, up to an
    eighth of ``ulimit -n``.

    Args:
        pin_memory: page-lock the staged memory. Ignored with a warning when there is no accelerator.
        share_memory: stage into shared memory, which torch.multiprocessing sends to other processes without a copy.
        pin_memory_min_bytes: smaller storages (bytes) are not pinned.
        lease: results own their buffers (NOTE [ The cache, and what it means ]). Not in torch.
    """

    _storages: _CachedStorages | _LeasedStorages

    def __init__(
        self,
        pin_memory: bool = False,
        share_memory: bool = False,
        pin_memory_min_bytes: int = 5,
        *,
        lease: bool = False,
    ) -> None:
        if pin_memory and accelerator.current() is None:
            warnings.warn(
                "pin_memory=True is ignored: pinning host memory needs an accelerator, and torch sees none",
                stacklevel=2,
            )
            pin_memory = False
        self.pin_memory = pin_memory
        self.share_memory = share_memory
        self.pin_memory_min_bytes = pin_memory_min_bytes
        buffers = HostBuffers(shared=share_memory, pinned=pin_memory, pin_min_bytes=pin_memory_min_bytes)
        super().__init__(_LeasedStorages(buffers) if lease else _CachedStorages(buffers))

    @property
    def _cached_storage_mapping(self) -> WeakIdKeyDictionary:
        return self._storages.mapping

    def stage(self, state_dict: Any, non_blocking: bool = False, *, memo: dict[int, Any] | None = None) -> Any:
        """Return a copy of ``state_dict`` on the CPU that later changes to the source cannot reach.

        Args:
            state_dict: any object; usually a dict.
            non_blocking: device copies may still be running on return; synchronize the stream they were issued on.
            memo: a dict that keeps the sources alive; keep it until the copies are done. Not in torch.

        Raises:
            UnstageableError: a value cannot be copied; names its key path. No partial copy is returned.
        """
        self._storages.begin_pass()
        return self.deepcopy_with_tensor_offload(state_dict, memo, non_blocking=non_blocking)

    def release(self, staged: Any) -> int:
        """End the lease of a result now: the next ``stage()`` may overwrite it. Returns the number of buffers it held."""
        return self._storages.release(storages_of(staged))

    def pinned_num_bytes(self) -> int:
        """Return the bytes of page-locked memory that it holds. Not in torch."""
        return self._storages.pinned_nbytes

    def close(self) -> None:
        """Forget all buffers. Results stay valid, and the stager can be used again, with new buffers."""
        self._storages.close()


def storages_of(staged: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages behind a staged object, including the local storages of wrapper subclasses."""
    pending, walked = [staged], dict[int, object]()
    while pending:
        for leaf in reachable_leaves(pending.pop(), walked):
            if isinstance(leaf, torch.UntypedStorage):
                yield leaf
                continue
            inner = _inner_tensors(leaf)
            pending += [*inner, *vars(leaf).values()]
            if not inner:
                yield leaf.untyped_storage()


def _inner_tensors(x: Any) -> list[Any]:
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    if hasattr(x, "__tensor_flatten__"):
        return [getattr(x, name) for name in x.__tensor_flatten__()[0]]
    if x.is_nested:
        return [x.values(), x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets()]
    return []
