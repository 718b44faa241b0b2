"""The slabs of an arena: how many there may be, their creation, and their end. All of it with the arena's lock held.

A slab that is no longer needed is *retired*: a thread gives its memory back to the system (9 GB/s measured). Until that is
done, its bytes count against the budget.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable

from stager.arena.buffer import Buffer, SlabState
from stager.workers.errors import MemoryBudgetError
from stager.workers.memory.slab import Slab

_RECENT_LEASES = 16
_NO_DESCRIPTOR = "could not duplicate a shared memory file descriptor"  # how torch says EMFILE, in a RuntimeError


class Slabs:
    """At most ``limit`` slabs that take at most ``max_bytes`` together.

    Attributes:
        changed: the lock; notified when anything changes that a lease may wait for.
        waiting: a ticket for each lease that is being asked for, oldest first.
        closed: no slab is created or leased any more.
    """

    def __init__(self, limit: int, max_bytes: int, available_bytes: Callable[[], int]) -> None:
        self.limit = limit
        self.max_bytes = max_bytes
        self.buffers: list[Buffer] = []
        self._available_bytes = available_bytes
        self.changed = threading.Condition()
        self.waiting: deque[object] = deque()
        self.closed = False
        self._recent: deque[int] = deque(maxlen=_RECENT_LEASES)
        self._retired: deque[Buffer] = deque()
        self._retired_nbytes = 0  # with those of the one that is being freed
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        return self._used() + self._retired_nbytes

    def free(self) -> list[Buffer]:
        return [buffer for buffer in self.buffers if buffer.state is SlabState.FREE]

    # -- creating -----------------------------------------------------------------------------------------------

    def has_room(self, nbytes: int) -> bool:
        """Whether the limits allow one more of ``nbytes`` bytes."""
        return len(self.buffers) < self.limit and self.nbytes + nbytes <= self.max_bytes

    def is_soon_free(self, nbytes: int) -> bool:
        """Whether a slab is being prepared, or memory freed for one: a lease waits for these, whatever the policy."""
        if any(buffer.state is SlabState.PREPARING for buffer in self.buffers):
            return True
        return self._retired_nbytes > 0 and len(self.buffers) < self.limit and self._used() + nbytes <= self.max_bytes

    def shortage(self, nbytes: int) -> str | None:
        """Return why the system lacks memory for a slab of ``nbytes`` bytes, or None.

        This is the last moment to say so, before the out-of-memory killer does.
        """
        available = self._available_bytes()
        promised = sum(max(0, buffer.nbytes - buffer.slab.allocated_nbytes) for buffer in self.buffers)
        if nbytes + promised <= available:
            return None
        of_them = f" ({promised:,} of them are promised to buffers not filled yet)" if promised else ""
        return (
            f"a buffer needs {nbytes:,} bytes of host memory, and {available:,} are available on this host or "
            f"in its cgroup{of_them}; arena.max_host_bytes allows {self.max_bytes:,}. Free memory, save a smaller "
            "state, or set arena.max_host_bytes to what is really there"
        )

    def create(self, nbytes: int) -> Buffer:
        """Add a slab; it gets its memory when it is written.

        Raises:
            MemoryBudgetError: the kernel refuses the address space.
            OSError: no descriptor is left.
        """
        try:
            buffer = Buffer(Slab.create(nbytes))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch could not map it
            if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE) or _NO_DESCRIPTOR in str(error):
                raise OSError(errno.EMFILE, "no descriptor is left for a buffer; raise `ulimit -n`") from error
            raise MemoryBudgetError(
                f"the kernel refused a buffer of {nbytes:,} bytes: {error}; see `ulimit -v` and `ulimit -f`"
            ) from error
        self.buffers.append(buffer)
        return buffer

    # -- retiring -----------------------------------------------------------------------------------------------

    def leased(self, nbytes: int) -> None:
        """Note that a snapshot of this size got a slab; retire free slabs whose size has not been asked for lately."""
        self._recent.append(nbytes)
        self.retire_wrong_sizes()

    def retire_wrong_sizes(self) -> None:
        """Retire free slabs that fit none of the last 16 leases."""
        if len(self._recent) == _RECENT_LEASES:
            for buffer in self.free():
                if not any(buffer.fits(nbytes) for nbytes in self._recent):
                    self.retire(buffer)

    def make_room(self, nbytes: int, *, as_much_as_possible: bool = False) -> bool:
        """Retire free slabs that are too small for ``nbytes``, if the limits then allow a new one; return whether any was.

        Args:
            as_much_as_possible: retire all of them, not only as many as the limits ask for.
        """
        small = [buffer for buffer in self.free() if buffer.nbytes < nbytes]
        kept_nbytes = self._used() - sum(buffer.nbytes for buffer in small)
        if len(self.buffers) - len(small) >= self.limit or kept_nbytes + nbytes > self.max_bytes:
            return False
        retired = False
        for buffer in sorted(small, key=lambda buffer: buffer.nbytes):
            enough = len(self.buffers) < self.limit and self._used() + nbytes <= self.max_bytes
            if enough and not as_much_as_possible:
                break
            self.retire(buffer)
            retired = True
        return retired

    def retire(self, buffer: Buffer) -> None:
        """Give the memory of a free slab back to the system, in a thread."""
        buffer.move(SlabState.RETIRED)
        self.buffers.remove(buffer)
        self._retired.append(buffer)
        self._retired_nbytes += buffer.nbytes
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._free_retired, name="stager-free", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be started: a limit, or the interpreter is ending
            self._free_retired()

    def drop(self, buffer: Buffer) -> None:
        """Give the memory of a free slab back at once: after close, no lease waits for the lock meanwhile."""
        buffer.move(SlabState.RETIRED)
        self.buffers.remove(buffer)
        buffer.slab.give_back()

    def freeing(self) -> threading.Thread | None:
        """The thread that frees what is retired, to be joined without the lock."""
        return self._thread

    def _used(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def _free_retired(self) -> None:
        while True:
            # 1. With the lock: retire() starts a thread only if none is there, so this one must not end in between.
            with self.changed:
                if not self._retired:
                    self._thread = None
                    return
                buffer = self._retired.popleft()
            # 2. Without the lock, because giving memory back takes long.
            nbytes = buffer.nbytes
            buffer.slab.give_back()
            del buffer  # the last reference: here the slab is unregistered and unmapped
            # 3. Only now the bytes no longer count against the budget.
            with self.changed:
                self._retired_nbytes -= nbytes
                self.changed.notify_all()
