"""Staging buffers that belong to a result until it lets go of them, and are used again afterwards.

NOTE [ Leases ]
The pool knows every buffer that it gave out. A buffer is *leased* while anything but the pool refers to it: a tensor, a view
of one, a numpy array over one. The lease ends by itself; ``release`` ends it early. A leased buffer is never given out
again, so a later ``stage()`` cannot change an earlier result.
The pool sees only this process. If a result was sent to another process, keep it (or a tensor of it) here until the other
side has finished reading, as ``dcp.async_save`` does by itself.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable

import torch

from stager.workers.memory.host_buffers import HostBuffers

_IDLE_PASSES = 2  # a buffer that was not used in this many passes is given back to the system


class _Buffer:
    __slots__ = ("last_pass", "released", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.last_pass = 0
        self.released = False

    def is_leased(self) -> bool:
        # The pool's own references: `self.storage` in C++; `self.storage` and getrefcount's argument in Python.
        used = torch._C._storage_Use_Count(self.storage._cdata) > 1 or sys.getrefcount(self.storage) > 2
        return used and not self.released


class BufferPool:
    """Not thread-safe: one staging pass at a time, ``release`` between passes."""

    def __init__(self, buffers: HostBuffers) -> None:
        self._buffers = buffers
        self._all: dict[int, _Buffer] = {}  # by identity of the storage, which the pool keeps alive
        self._free: dict[int, list[_Buffer]] = {}  # by size in bytes
        self._pass = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, leased or not."""
        return sum(buffer.storage.nbytes() for buffer in self._all.values())

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of all buffers that are page-locked, leased or not."""
        return sum(self._buffers.pinned_of(buffer.storage.nbytes()) for buffer in self._all.values())

    def has_free(self, nbytes: int) -> bool:
        """Whether :meth:`take` has a buffer of this size, as of the last :meth:`begin_pass`."""
        return bool(self._free.get(nbytes))

    def drop_unleased(self) -> None:
        """Give back every buffer that no result has, to make room."""
        for key, buffer in list(self._all.items()):
            if not buffer.is_leased():
                self._drop(key)
        self._free = {}

    def begin_pass(self) -> None:
        """Find out which leases have ended. Call this once before the :meth:`take` calls of a pass."""
        self._pass += 1
        free: dict[int, list[_Buffer]] = defaultdict(list)
        idle = []
        for key, buffer in self._all.items():
            if buffer.is_leased():
                continue
            if self._pass - buffer.last_pass > _IDLE_PASSES:
                idle.append(key)
            else:
                free[buffer.storage.nbytes()].append(buffer)
        for key in idle:
            self._drop(key)
        for waiting in free.values():
            waiting.reverse()  # oldest first: a structure that did not change gets its own buffers back
        self._free = free

    def _drop(self, key: int) -> None:
        self.dropped(self._all.pop(key).storage)

    def dropped(self, storage: torch.UntypedStorage) -> None:
        """Called with a buffer that nobody reads, before it is given back."""

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """Return a buffer of exactly ``nbytes`` that nobody reads, leased until its last user drops it."""
        waiting = self._free.get(nbytes)
        if waiting:
            buffer = waiting.pop()
        else:
            buffer = _Buffer(self._buffers.new(nbytes))
            self._all[id(buffer.storage)] = buffer
        buffer.last_pass = self._pass
        buffer.released = False
        return buffer.storage

    def release(self, storages: Iterable[torch.UntypedStorage]) -> int:
        """End the leases of these buffers, even if something still refers to them; return how many were the pool's."""
        count = 0
        for storage in storages:
            buffer = self._all.get(id(storage))
            if buffer is not None and not buffer.released:
                buffer.released = True
                count += 1
        return count

    def close(self) -> None:
        """Forget every buffer. Leased ones live on with their results."""
        self._all.clear()
        self._free = {}
        self._buffers.drop()
