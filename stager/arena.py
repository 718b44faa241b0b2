"""The arena: a few slabs, leased to snapshots in flight.

    FREE --lease--> LEASED --snapshot whole--> STAGED --handed over--> PERSISTING --committed or failed--> FREE

Guarantees
  * A slab in use is never written by another save: it is leased again only when every worker is done with it.
  * Never more memory than ``max_bytes``: what does not fit is refused before anything is allocated.
  * One descriptor per slab. Nothing has a name, so nothing can be left behind.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from enum import Enum

from workers.errors import ArenaFullError, ClosedError, InternalError, MemoryBudgetError
from workers.offload.pinning import pin_in_chunks
from workers.slab import Slab

logger = logging.getLogger("stager")

_SLACK_BYTES = 1 << 20  # a slab this much (or half) too large is used as it is
_BACKGROUND_NICE = 10


class SlabState(Enum):
    FREE = "free"
    LEASED = "leased"
    STAGED = "staged"
    PERSISTING = "persisting"


_TRANSITIONS = {
    SlabState.FREE: {SlabState.LEASED},
    SlabState.LEASED: {SlabState.STAGED, SlabState.FREE},
    SlabState.STAGED: {SlabState.PERSISTING, SlabState.FREE},
    SlabState.PERSISTING: {SlabState.FREE},
}


class _Buffer:
    """A slab and its state. ``pinned_nbytes`` of it are registered with CUDA, until its storage is collected."""

    def __init__(self, slab: Slab, pin: bool) -> None:
        self.slab = slab
        self.state = SlabState.FREE
        self.pinned_nbytes = pin_in_chunks(slab.storage, slab.address, slab.nbytes) if pin else 0

    def move(self, to: SlabState) -> None:
        if to not in _TRANSITIONS[self.state]:
            raise InternalError(f"slab {self.slab.slab_id} cannot go from {self.state.value} to {to.value}")
        self.state = to


class Lease:
    """The right to a slab until :meth:`release`, which is idempotent."""

    def __init__(self, arena: Arena, buffer: _Buffer) -> None:
        self._arena = arena
        self._buffer: _Buffer | None = buffer

    @property
    def slab(self) -> Slab:
        if self._buffer is None:
            raise InternalError("a lease was used after its release")
        return self._buffer.slab

    def move(self, to: SlabState) -> None:
        if self._buffer is not None:
            self._buffer.move(to)

    def release(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._arena._give_back(buffer)


class Arena:
    """Args:
    buffers: how many slabs at most, at least 2.
    max_bytes: how much memory they may take together.
    when_full: "wait", "skip" or "raise".
    prefault: allocate the pages of a slab ahead of its first use, in a background thread.
    pin: register slabs with CUDA.
    """

    def __init__(
        self, buffers: int, max_bytes: int, when_full: str, *, prefault: bool = True, pin: bool = False
    ) -> None:
        self._num_buffers = buffers
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._prefault = prefault
        self._pin = pin
        self._buffers: list[_Buffer] = []
        self._changed = threading.Condition()
        self._closed = False
        self._preparing: threading.Thread | None = None
        self._warned = False

    def lease(self, nbytes: int) -> Lease | None:
        """A slab of at least ``nbytes`` bytes; None when all are in use and ``when_full`` is "skip".

        Raises:
            MemoryBudgetError: it can never fit.
            ArenaFullError: all are in use and ``when_full`` is "raise".
            ClosedError
        """
        with self._changed:
            self._check_budget(nbytes)
            while True:
                if self._closed:
                    raise ClosedError("the Checkpointer is closed")
                buffer = self._take(nbytes)
                if buffer is not None:
                    buffer.move(SlabState.LEASED)
                    return Lease(self, buffer)
                if self._when_full == "skip":
                    return None
                if self._when_full == "raise":
                    raise ArenaFullError(
                        f"all {len(self._buffers)} buffers hold snapshots that are not committed yet; "
                        "save less often, raise arena.buffers, or set arena.when_full to wait or skip"
                    )
                self._changed.wait()

    def prepare(self, nbytes: int) -> None:
        """Create and prefault every slab a state of ``nbytes`` bytes will need; waits until that is done."""
        self._check_budget(nbytes)
        while (buffer := self._add_spare(nbytes)) is not None:
            self._warm(buffer)
        with self._changed:
            warm = [b for b in self._buffers if b.state is SlabState.FREE]
        for buffer in warm:
            buffer.slab.prefault()

    def prepare_in_background(self, nbytes: int) -> None:
        """As :meth:`prepare`, in a low-priority thread, for slabs that are not there yet."""
        with self._changed:
            busy = self._preparing is not None and self._preparing.is_alive()
            if self._closed or not self._prefault or busy or not self._has_room(nbytes):
                return
            self._preparing = threading.Thread(
                target=self._prepare_quietly, args=(nbytes,), name="stager-prefault", daemon=True
            )
            self._preparing.start()

    def live_slabs(self) -> frozenset[str]:
        with self._changed:
            return frozenset(buffer.slab.slab_id for buffer in self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, in use or not."""
        with self._changed:
            return sum(buffer.slab.nbytes for buffer in self._buffers)

    def close(self) -> None:
        """Free all slabs. Those still leased are freed by their release."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            preparing = self._preparing
        if preparing is not None:
            preparing.join()
        with self._changed:
            for buffer in [b for b in self._buffers if b.state is SlabState.FREE]:
                self._drop(buffer)

    # -- with the lock held -------------------------------------------------------------------------------------

    def _check_budget(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise MemoryBudgetError(
                f"the snapshot needs {nbytes:,} bytes of host memory, arena.max_host_bytes allows {self._max_bytes:,}; "
                "raise it, or save a smaller state"
            )
        if nbytes * self._num_buffers > self._max_bytes and not self._warned:
            self._warned = True
            logger.warning(
                "arena.buffers is %d, but only %d snapshots of %d bytes fit arena.max_host_bytes (%d): "
                "a save that finds none free follows arena.when_full (%s)",
                self._num_buffers,
                self._max_bytes // nbytes,
                nbytes,
                self._max_bytes,
                self._when_full,
            )

    def _take(self, nbytes: int) -> _Buffer | None:
        """A free buffer that fits, or a new one if there may be one."""
        fitting = [b for b in self._buffers if b.state is SlabState.FREE and _fits(b.slab, nbytes)]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.slab.nbytes)
        return self._create(nbytes)

    def _create(self, nbytes: int) -> _Buffer | None:
        """A new buffer, in place of free ones of the wrong size; None when the limits leave no room."""
        while not self._has_room(nbytes):
            spare = next((b for b in self._buffers if b.state is SlabState.FREE and not _fits(b.slab, nbytes)), None)
            if spare is None:
                return None
            self._drop(spare)
        buffer = _Buffer(Slab.create(nbytes), self._pin)
        self._buffers.append(buffer)
        return buffer

    def _has_room(self, nbytes: int) -> bool:
        used = sum(buffer.slab.nbytes for buffer in self._buffers)
        return len(self._buffers) < self._num_buffers and used + nbytes <= self._max_bytes

    def _drop(self, buffer: _Buffer) -> None:
        self._buffers.remove(buffer)  # nobody else holds the slab: its memory is unpinned and unmapped here

    def _give_back(self, buffer: _Buffer) -> None:
        with self._changed:
            buffer.move(SlabState.FREE)
            if self._closed:
                self._drop(buffer)
            self._changed.notify_all()

    # -- the prefault thread ------------------------------------------------------------------------------------

    def _prepare_quietly(self, nbytes: int) -> None:
        with suppress(OSError):  # niceness is per thread on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICE)
        while (buffer := self._add_spare(nbytes)) is not None:
            self._warm(buffer)

    def _add_spare(self, nbytes: int) -> _Buffer | None:
        """A new free buffer, marked as leased while it is being warmed."""
        with self._changed:
            if self._closed or not self._has_room(nbytes):
                return None
            buffer = self._create(nbytes)
            if buffer is not None:
                buffer.move(SlabState.LEASED)
            return buffer

    def _warm(self, buffer: _Buffer) -> None:
        started = time.monotonic()
        try:
            buffer.slab.prefault(lambda: not self._closed)
        except MemoryError as error:
            logger.warning("prefaulting a buffer failed: %s", error)
        logger.debug("prefaulted %d bytes in %.2f s", buffer.slab.nbytes, time.monotonic() - started)
        self._give_back(buffer)


def _fits(slab: Slab, nbytes: int) -> bool:
    return nbytes <= slab.nbytes <= nbytes + nbytes // 2 + _SLACK_BYTES
