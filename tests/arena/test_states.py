"""A slab's states: the legal moves, and no others."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from stager.arena.buffer import Buffer, Lease, SlabState
from stager.workers.errors import InternalError
from stager.workers.memory.slab import Slab

FREE, PREPARING, LEASED = SlabState.FREE, SlabState.PREPARING, SlabState.LEASED
STAGED, PERSISTING, RETIRED = SlabState.STAGED, SlabState.PERSISTING, SlabState.RETIRED

PATHS = [
    (FREE, LEASED, STAGED, PERSISTING, FREE),
    (FREE, LEASED, FREE),
    (FREE, LEASED, STAGED, FREE),
    (FREE, PREPARING, FREE),
    (FREE, RETIRED),
]
LEGAL = {move for path in PATHS for move in pairwise(path)}


@pytest.mark.parametrize(("start", "end"), list(product(SlabState, SlabState)))
def test_only_the_legal_moves_are_made(start: SlabState, end: SlabState) -> None:
    buffer = Buffer(Slab.create(10))
    buffer.state = start
    if (start, end) in LEGAL:
        buffer.move(end)
        assert buffer.state is end
    else:
        with pytest.raises(InternalError, match=f"cannot go from {start.value} to {end.value}"):
            buffer.move(end)
        assert buffer.state is start


def test_lease_ends_once() -> None:
    given_back: list[Buffer] = []
    buffer = Buffer(Slab.create(10))
    buffer.move(LEASED)
    lease = Lease(buffer, 10, given_back.append)
    lease.release()
    lease.release()
    lease.move(STAGED)  # of a save that failed meanwhile
    assert given_back == [buffer]
    assert buffer.state is LEASED
    with pytest.raises(InternalError, match="after its release"):
        assert lease.slab


def test_staged_slab_is_warm_as_far_as_it_was_written() -> None:
    buffer = Buffer(Slab.create(10_000))
    buffer.move(LEASED)
    lease = Lease(buffer, 6_000, lambda _: None)
    assert not lease.warm
    lease.move(STAGED)
    assert lease.warm
    assert buffer.slab.warm_nbytes == 6_000
