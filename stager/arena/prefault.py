"""Slabs made ready ahead of their first use: their pages allocated, and pinned.

A page that is not allocated yet costs a page fault when it is first written. Copies into such memory run at 0.7 GB/s, and
into memory with its pages at 10 (2 cores, Linux 6.18).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from stager.arena.buffer import Buffer, SlabState
from stager.arena.slabs import Slabs
from stager.config.host import lower_priority, usable_cores
from stager.workers.errors import MemoryBudgetError

logger = logging.getLogger("stager")

_MAX_THREADS = 4
_SKIPPED_AFTER_REFUSAL = 16  # saves, before it is asked again whether the system has memory for a spare


class Prefaulter:
    """Makes the slabs of an arena ready, and registers them with CUDA if ``pin``.

    Work in the background stops as soon as a lease waits: a cold slab is better than none.
    """

    def __init__(self, slabs: Slabs, pin: bool) -> None:
        self._slabs = slabs
        self._pin = pin
        self._thread: threading.Thread | None = None
        self._starts_to_skip = 0
        self._wanted, self._replaces = 0, False  # what the thread prepares
        self._num_waiting = 0  # calls of run(): somebody waits

    def run(self, nbytes: int) -> None:
        """Prepare every slab that states of ``nbytes`` bytes will need, with several threads; return when that is done.

        Raises:
            MemoryBudgetError: the system has no memory for a single one, or ran out of it.
        """
        num_threads = min(usable_cores(), _MAX_THREADS)
        with self._slabs.changed:
            self._num_waiting += 1  # the background thread stops; this call finishes the slab that it had begun
        try:
            while (buffer := self._next(nbytes)) is not None:
                self._warm(buffer, lambda: not self._slabs.closed, num_threads)
        finally:
            with self._slabs.changed:
                self._num_waiting -= 1

    def start(self, nbytes: int, *, replaces: bool = False) -> None:
        """Create and prefault slabs of ``nbytes`` bytes in a low-priority thread. The caller holds the lock.

        Does nothing while that thread prepares slabs that are large enough, if there is no room for a new slab, or for some
        calls after a failure.

        Args:
            replaces: free slabs that are too small make room: they were prepared by a guess, and this is a better one.
        """
        if self._thread is not None and self._thread.is_alive():
            if replaces and nbytes > self._wanted:  # the thread goes on with this
                self._wanted, self._replaces = nbytes, True
            return
        if replaces:
            self._slabs.make_room(nbytes)
        if not self._slabs.has_room(nbytes):
            return
        if self._starts_to_skip:
            self._starts_to_skip -= 1
            return
        self._wanted, self._replaces = nbytes, replaces
        thread = threading.Thread(target=self._run_quietly, name="stager-prefault", daemon=True)
        with suppress(RuntimeError):  # the interpreter is shutting down, or no thread can be had
            thread.start()
            self._thread = thread

    def join(self) -> None:
        """Wait for the thread, without the lock. Close the arena first, or this takes as long as the work does."""
        if self._thread is not None:
            self._thread.join()

    def _run_quietly(self) -> None:
        lower_priority()
        try:
            while (buffer := self._next_spare()) is not None:
                self._warm(buffer, partial(self._is_wanted, buffer), num_threads=1)
        except (MemoryError, OSError) as error:
            self._starts_to_skip = _SKIPPED_AFTER_REFUSAL
            # As text: the error's traceback would keep the slab mapped as long as a handler keeps the log record.
            logger.warning("no buffer was prepared ahead of the next save: %s", str(error))

    def _is_wanted(self, buffer: Buffer) -> bool:
        if self._slabs.closed or self._slabs.waiting or self._num_waiting:
            return False
        return buffer.nbytes >= self._wanted

    def _next_spare(self) -> Buffer | None:
        slabs = self._slabs
        with slabs.changed:
            nbytes = self._wanted
            if self._replaces:
                slabs.make_room(nbytes)
            if slabs.closed or slabs.waiting or self._num_waiting or not slabs.has_room(nbytes):
                return None
            shortage = slabs.shortage(nbytes)
            if shortage is not None:
                raise MemoryBudgetError(shortage)
            return slabs.create(nbytes).move(SlabState.PREPARING)

    def _next(self, nbytes: int) -> Buffer | None:
        """Take a free slab that fits and is not ready, or a new one; None: nothing is left to do."""
        slabs = self._slabs
        with slabs.changed:
            while not slabs.closed:
                fitting = [b for b in slabs.buffers if b.fits(nbytes)]
                for buffer in fitting:
                    if buffer.state is SlabState.FREE and not self._is_ready(buffer):
                        return buffer.move(SlabState.PREPARING)
                slabs.make_room(nbytes)
                if slabs.has_room(nbytes):
                    shortage = slabs.shortage(nbytes)
                    if shortage is None:
                        return slabs.create(nbytes).move(SlabState.PREPARING)
                    if fitting:
                        logger.warning("%d of %d buffers are prepared: %s", len(fitting), slabs.limit, shortage)
                        return None
                    if not slabs.make_room(nbytes, as_much_as_possible=True):
                        raise MemoryBudgetError(shortage)
                if not slabs.is_soon_free(nbytes):
                    return None
                slabs.changed.wait()
            return None

    def _is_ready(self, buffer: Buffer) -> bool:
        return buffer.slab.warm_nbytes >= buffer.nbytes and not (self._pin and buffer.pinned_nbytes is None)

    def _warm(self, buffer: Buffer, keep_going: Callable[[], bool], num_threads: int) -> None:
        """Allocate the pages of a buffer's slab, and pin them, as long as ``keep_going`` says so. Then the buffer is free.

        Raises:
            MemoryBudgetError: the system ran out of memory. The buffer is gone.
        """
        started = time.monotonic()
        slabs, failed = self._slabs, False
        try:
            buffer.slab.prefault(keep_going, num_threads)
            if self._pin and buffer.slab.warm_nbytes >= buffer.nbytes:
                buffer.pin()
        except MemoryError as error:
            failed = True
            raise MemoryBudgetError(f"{error}; free memory on this host, or lower arena.max_host_bytes") from error
        finally:
            logger.debug("prefaulted %d bytes in %.2f s", buffer.slab.warm_nbytes, time.monotonic() - started)
            with slabs.changed:
                buffer.move(SlabState.FREE)
                if failed:  # a slab without all of its pages must not be leased: writing to it could end in SIGBUS
                    slabs.retire(buffer)  # a thread frees it, because a lease may wait for the lock
                elif slabs.closed:
                    slabs.drop(buffer)  # freed at once: after close no lease waits for the lock
                slabs.changed.notify_all()
