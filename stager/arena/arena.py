"""The arena: a few slabs, leased to snapshots in flight.

``buffer.py`` has the states of a slab, ``slabs.py`` creates and frees them, ``prefault.py`` makes them ready.

Guarantees
  * A slab in use is never written by another save: it is leased again only when every worker is done with it.
  * Slabs never take more memory than ``max_bytes``: what does not fit is refused before anything is allocated.
  * One descriptor per slab. Nothing has a name, so nothing can be left behind.
  * Saves that wait for a slab get it in the order of asking; ``close()`` wakes them.

NOTE [ Which slab a lease gets ]
  1. The smallest free one that fits.
  2. A new one, if the limits leave room.
  3. A free one that is far too large.
  4. A new one in place of free ones that are too small.
  5. None: ``when_full`` decides.
A slab that fits none of the last 16 leases has the wrong size, and is dropped when it is free. So a state that alternates
between two sizes (all of it, weights only) keeps its slabs, and one that has changed for good gives the old memory back.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable

from stager.arena.buffer import Buffer, Lease, SlabState
from stager.arena.prefault import Prefaulter
from stager.arena.slabs import Slabs
from stager.config.host import available_memory_bytes
from stager.workers.errors import ArenaFullError, ClosedError, MemoryBudgetError
from stager.workers.long_wait import LongWait

__all__ = ["Arena", "Lease", "SlabState"]

logger = logging.getLogger("stager")

_DEADLINE_POLL_SECS = 0.2


class Arena:
    """Owns the slabs. Every method may be called from any thread. After ``fork()`` the child cannot use it.

    Args:
        buffers: how many slabs at most.
        max_bytes: how much memory they may take together.
        when_full: "wait", "skip" or "raise".
        prefault: allocate the pages of a slab ahead of its first use, in a background thread.
        pin: register slabs with CUDA.
        available_bytes: memory that the system can give; asked right before a slab is created, and at no other time.
    """

    def __init__(
        self,
        buffers: int,
        max_bytes: int,
        when_full: str,
        *,
        prefault: bool = True,
        pin: bool = False,
        available_bytes: Callable[[], int] = available_memory_bytes,
    ) -> None:
        self.max_slab_nbytes = max_bytes  # the largest snapshot that can be staged in one slab
        # Of larger snapshots: whole pages, and so small that every buffer can be in flight.
        self.piece_nbytes = max(mmap.PAGESIZE, max_bytes // buffers // mmap.PAGESIZE * mmap.PAGESIZE)
        self.num_buffers = buffers
        self._when_full = when_full
        self._prefault = prefault
        self._pin = pin
        self._owner = os.getpid()
        self._slabs = Slabs(buffers, max_bytes, available_bytes)
        self._changed = self._slabs.changed
        self._prefaulter = Prefaulter(self._slabs, pin)
        self._warned: set[str] = set()
        self._remaining_secs: Callable[[], float | None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, in use or not."""
        with self._changed:
            return self._slabs.nbytes

    def live_slabs(self) -> frozenset[str]:
        with self._changed:
            return frozenset(buffer.slab.slab_id for buffer in self._slabs.buffers)

    def lease(self, nbytes: int, when_full: str | None = None) -> Lease | None:
        """Lease a slab of at least ``nbytes`` bytes; None: all are in use and the policy is "skip".

        While other saves wait, the arena is full for a later one, even if a slab that is too small for the others is free.

        Args:
            when_full: "wait", "skip" or "raise"; None: the arena's own.

        Raises:
            MemoryBudgetError: it can never fit; or the system has no memory for it, with no slab in flight to wait for.
            ArenaFullError: all are in use and the policy is "raise".
            ClosedError: closed, also while waiting; or this is a forked child.
        """
        self._check_process()
        ticket = object()
        with self._changed:
            self._check_budget(nbytes)
            self._slabs.waiting.append(ticket)
            try:
                buffer = self._await(ticket, nbytes, when_full or self._when_full)
            finally:
                self._slabs.waiting.remove(ticket)
                self._changed.notify_all()
        if buffer is None:
            return None
        lease = Lease(buffer, nbytes, self._give_back)
        if self._pin:  # without the lock: this can take as long as allocating the memory
            try:
                buffer.pin()
            except BaseException:
                lease.release()
                raise
        return lease

    def wait_no_longer_than(self, remaining_secs: Callable[[], float | None]) -> None:
        """From now on a lease asks how long it may wait (None: without end). With no time left it raises ArenaFullError."""
        self._remaining_secs = remaining_secs

    def prepare(self, nbytes: int) -> None:
        """Create and prefault every slab that states of ``nbytes`` bytes will need; return when that is done.

        Raises:
            MemoryBudgetError: not even one fits, or the system has no memory for it.
            ClosedError
        """
        self._check_process()
        with self._changed:
            self._check_budget(nbytes)
        self._prefaulter.run(nbytes)
        with self._changed:
            self._check_open()

    def prepare_in_background(self, nbytes: int, *, is_guess: bool = False) -> None:
        """As :meth:`prepare`, in a low-priority thread, and only where the limits leave room.

        It stops as soon as a lease has to wait: a cold slab is better than none.

        Args:
            is_guess: no snapshot of this size was taken yet. It replaces what was prepared by a guess of fewer bytes.
        """
        self._check_process()
        with self._changed:
            if self._prefault and not self._slabs.closed:
                self._prefaulter.start(nbytes, replaces=is_guess)

    def close(self) -> None:
        """Free all slabs. Those still leased are freed by their release. Idempotent."""
        if os.getpid() != self._owner:
            return
        # 1. Wake all who wait, and have the background thread stop.
        with self._changed:
            self._slabs.closed = True
            self._changed.notify_all()
        # 2. Without the lock, which both threads take.
        self._prefaulter.join()
        freeing = self._slabs.freeing()
        if freeing is not None:
            freeing.join()
        # 3. No thread uses a free slab any more.
        with self._changed:
            for buffer in self._slabs.free():
                self._slabs.drop(buffer)

    # -- with the lock held -------------------------------------------------------------------------------------

    def _await(self, ticket: object, nbytes: int, when_full: str) -> Buffer | None:
        waiting = LongWait(
            "a free buffer for the snapshot",
            self._remaining_secs(),
            "all hold snapshots that are not committed yet; save less often, raise arena.buffers, or let arena.when_full "
            "skip such a save",
        )
        while True:
            self._check_open()
            is_first = self._slabs.waiting[0] is ticket
            buffer = self._take(nbytes) if is_first else None
            if buffer is not None:
                buffer.move(SlabState.LEASED)
                self._slabs.leased(nbytes)
                return buffer
            if not (is_first and self._slabs.is_soon_free(nbytes)):
                if when_full == "skip":
                    return None
                if when_full == "raise":
                    raise ArenaFullError(
                        f"all {len(self._slabs.buffers)} buffers hold snapshots that are not committed yet; "
                        "save less often, raise arena.buffers, or set arena.when_full to wait or skip"
                    )
            self._wait_for_change()
            waiting.tick()

    def _wait_for_change(self) -> None:
        remaining = self._remaining_secs()
        if remaining is not None and remaining <= 0:
            raise ArenaFullError(
                f"all {len(self._slabs.buffers)} buffers still held uncommitted snapshots at the deadline given to "
                "on_preemption(); this save is not taken, and the workers go on with those before it"
            )
        # A signal handler can set the deadline at any moment. It must not take this lock, so look again now and then.
        self._changed.wait(_DEADLINE_POLL_SECS if remaining is None else min(remaining, _DEADLINE_POLL_SECS))

    def _take(self, nbytes: int) -> Buffer | None:
        """See NOTE [ Which slab a lease gets ]."""
        slabs = self._slabs
        while True:
            free = min((b for b in slabs.free() if b.nbytes >= nbytes), key=lambda b: b.nbytes, default=None)
            if free is not None and free.fits(nbytes):
                return free
            has_room = slabs.has_room(nbytes)
            # Asked at the last moment: other processes take memory, too.
            shortage = slabs.shortage(nbytes) if has_room else None
            if has_room and shortage is None:
                return slabs.create(nbytes)
            if free is not None:
                return free
            if not slabs.make_room(nbytes, as_much_as_possible=shortage is not None):
                break
        if shortage is not None and not self._slabs.is_soon_free(nbytes):
            if not slabs.buffers:  # no buffer would give memory back, however long the lease waited
                raise MemoryBudgetError(shortage)
            self._warn_once("shortage", "%s. Until then fewer snapshots can be in flight", shortage)
        return None

    def _check_budget(self, nbytes: int) -> None:
        num_buffers, max_bytes = self._slabs.limit, self._slabs.max_bytes
        if nbytes > max_bytes:
            raise MemoryBudgetError(
                f"the snapshot needs {nbytes:,} bytes of host memory, and arena.max_host_bytes allows {max_bytes:,}; "
                "raise arena.max_host_bytes, or save a smaller state"
            )
        if nbytes * num_buffers > max_bytes:
            self._warn_once(
                "buffers",
                "arena.buffers is %d, but only %d snapshots of %d bytes fit arena.max_host_bytes (%d): "
                "a save that finds none free follows arena.when_full (%s)",
                num_buffers,
                max_bytes // nbytes,
                nbytes,
                max_bytes,
                self._when_full,
            )

    def _check_open(self) -> None:
        if self._slabs.closed:
            raise ClosedError("the Checkpointer is closed")

    def _warn_once(self, what: str, message: str, *arguments: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message, *arguments)

    # -- without the lock ---------------------------------------------------------------------------------------

    def _give_back(self, buffer: Buffer) -> None:
        if os.getpid() != self._owner:  # the slab is the parent's, and its lock may be held for ever here
            return
        with self._changed:
            buffer.move(SlabState.FREE)
            if self._slabs.closed:
                self._slabs.drop(buffer)
            else:
                self._slabs.retire_wrong_sizes()
            self._changed.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise ClosedError(
                f"this arena belongs to process {self._owner}; make a new Checkpointer in the forked child"
            )
