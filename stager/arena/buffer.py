"""A buffer of the arena: a slab, what it is used for, and the lease on it.

            .-> PREPARING -.
    FREE <--'              '-> FREE
     | ^ '---------------> RETIRED             its memory is given back to the system
     v |
    LEASED --snapshot whole--> STAGED --handed over--> PERSISTING --committed or failed--> FREE

Invariant: only the arena moves a buffer out of FREE, with its lock held. What it moved the buffer for then owns it, until it
is FREE again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from functools import partial

from stager.workers.device.host_memory import pin_in_chunks
from stager.workers.errors import InternalError
from stager.workers.memory.slab import Slab


class SlabState(Enum):
    FREE = "free"
    PREPARING = "preparing"
    LEASED = "leased"
    STAGED = "staged"
    PERSISTING = "persisting"
    RETIRED = "retired"


_TRANSITIONS = {
    SlabState.FREE: {SlabState.LEASED, SlabState.PREPARING, SlabState.RETIRED},
    SlabState.PREPARING: {SlabState.FREE},
    SlabState.LEASED: {SlabState.STAGED, SlabState.FREE},
    SlabState.STAGED: {SlabState.PERSISTING, SlabState.FREE},
    SlabState.PERSISTING: {SlabState.FREE},
    SlabState.RETIRED: set(),
}
_SLACK_BYTES = 1 << 20


class Buffer:
    """A slab of the arena and its state. What users call a buffer (``arena.buffers``) is its memory.

    Attributes:
        pinned_nbytes: so much of it is registered with the accelerator, until its storage is collected; None: not tried yet.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.nbytes = slab.nbytes
        self.state = SlabState.FREE
        self.pinned_nbytes: int | None = None

    def move(self, to: SlabState) -> Buffer:
        if to not in _TRANSITIONS[self.state]:
            raise InternalError(f"slab {self.slab.slab_id} cannot go from {self.state.value} to {to.value}")
        self.state = to
        return self

    def fits(self, nbytes: int) -> bool:
        """Neither too small for a snapshot of ``nbytes`` bytes nor far too large."""
        return nbytes <= self.nbytes <= nbytes + nbytes // 2 + _SLACK_BYTES

    def pin(self) -> None:
        """Register it with the accelerator, once. Only its owner may."""
        if self.pinned_nbytes is None:
            self.pinned_nbytes = 0  # before the call: where its warning is raised as an error, do not try again
            self.pinned_nbytes = pin_in_chunks(self.slab.storage, self.slab.address, self.nbytes)
            self.slab.warm_nbytes = max(self.slab.warm_nbytes, self.pinned_nbytes)  # pinning allocates the pages


class Lease:
    """The right to a buffer, until :meth:`release` and all that :meth:`hold` returned were called. Each is idempotent.

    ``nbytes`` is what was asked for; the slab may be larger.
    """

    def __init__(self, buffer: Buffer, nbytes: int, give_back: Callable[[Buffer], None]) -> None:
        self.nbytes = nbytes
        self._buffer: Buffer | None = buffer
        self._give_back = give_back
        self._own = object()
        self._holders = {self._own}
        self._lock = threading.Lock()

    @property
    def slab(self) -> Slab:
        if self._buffer is None:
            raise InternalError(f"a lease of {self.nbytes} bytes was used after its release")
        return self._buffer.slab

    @property
    def warm(self) -> bool:
        """Whether the first ``nbytes`` bytes have their pages; otherwise those from ``slab.warm_nbytes`` on do not."""
        return self.slab.warm_nbytes >= self.nbytes

    def move(self, to: SlabState) -> None:
        if self._buffer is None:
            return
        self._buffer.move(to)
        if to is SlabState.STAGED:  # written from end to end
            slab = self._buffer.slab
            slab.warm_nbytes = max(slab.warm_nbytes, self.nbytes)

    def hold(self) -> Callable[[], None]:
        """Keep the slab leased for another reader, until what this returns is called."""
        holder = object()
        with self._lock:
            if self._buffer is None:
                raise InternalError(f"a lease of {self.nbytes} bytes was held after its release")
            self._holders.add(holder)
        return partial(self._let_go, holder)

    def release(self) -> None:
        self._let_go(self._own)

    def _let_go(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            if self._holders:
                return
            buffer, self._buffer = self._buffer, None
        if buffer is not None:  # without the lock: the arena takes its own
            self._give_back(buffer)
