"""When the state's size changes: what is created, what is kept, what is given back."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stager.arena.arena import Arena, SlabState
from stager.arena.buffer import Buffer
from stager.workers.memory.slab import Slab
from tests.arena.conftest import MIB, sizes, start_waiting, take, wait_for_freeing
from tests.leaks import _slab_mappings

Make = Callable[..., Arena]
SMALL, LARGE = MIB, 10 * MIB


def save(arena: Arena, nbytes: int) -> str:
    """A lease through all its states; the slab's identity."""
    lease = take(arena, nbytes)
    slab_id = lease.slab.slab_id
    lease.move(SlabState.STAGED)
    lease.move(SlabState.PERSISTING)
    lease.release()
    return slab_id


@pytest.mark.parametrize(
    ("slab", "snapshot", "fits"),
    [
        (1000, 1001, False),
        (1000, 1000, True),
        (30 * MIB, 20 * MIB, True),
        (40 * MIB, 20 * MIB, False),
        (MIB, 1, True),
        (MIB + 2, 1, False),
    ],
)
def test_what_fits(slab: int, snapshot: int, fits: bool) -> None:
    assert Buffer(Slab.create(slab)).fits(snapshot) is fits


def test_growth_takes_the_place_of_slabs_that_are_too_small(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    leases = [take(arena, SMALL), take(arena, SMALL)]
    for lease in leases:
        lease.release()
    leases = [take(arena, LARGE), take(arena, LARGE)]
    assert sizes(arena) == [LARGE, LARGE]
    wait_for_freeing(arena)
    assert arena.nbytes == 2 * LARGE


def test_growth_within_the_bytes_of_the_budget(make_arena: Make) -> None:
    """Two small slabs and one large one exceed it: the lease waits until memory is freed, whatever the policy."""
    arena = make_arena(buffers=4, max_bytes=LARGE + SMALL)
    for lease in [take(arena, SMALL) for _ in range(3)]:
        lease.release()
    assert take(arena, LARGE, "skip").nbytes == LARGE
    assert sizes(arena) == [SMALL, LARGE]  # no more than had to go


def test_growth_waits_for_small_slabs_in_flight(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=2, max_bytes=LARGE + SMALL, when_full="wait")
    in_flight = [take(arena, SMALL), take(arena, SMALL)]
    waiting = start_waiting(threads, arena, LARGE)
    in_flight[0].release()
    granted = waiting.result()
    assert granted is not None
    assert granted.slab.nbytes == LARGE
    assert sizes(arena) == [SMALL, LARGE]


def test_nothing_is_given_up_for_a_lease_that_gets_nothing(make_arena: Make) -> None:
    arena = make_arena(buffers=2, max_bytes=LARGE + SMALL, when_full="skip")
    large, small = take(arena, LARGE), take(arena, SMALL)
    small.release()
    assert arena.lease(LARGE) is None
    assert sizes(arena) == [SMALL, LARGE]
    large.release()


def test_smaller_state_uses_the_old_slabs_and_then_lets_them_go(make_arena: Make) -> None:
    arena = make_arena(buffers=4)
    old = [take(arena, LARGE) for _ in range(4)]
    ids = {lease.slab.slab_id for lease in old}
    for lease in old:
        lease.release()
    assert {save(arena, SMALL) for _ in range(15)} <= ids  # there, and warm
    assert sizes(arena) == [LARGE] * 4
    assert save(arena, SMALL) in ids  # the 16th: from now on no recent lease fitted them
    wait_for_freeing(arena)
    assert arena.nbytes == 0
    save(arena, SMALL)
    assert sizes(arena) == [SMALL]


def test_wrong_size_in_flight_goes_when_it_is_released(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    large = take(arena, LARGE)
    for _ in range(20):
        save(arena, SMALL)
    assert sizes(arena) == [SMALL, LARGE]
    large.release()
    assert sizes(arena) == [SMALL]


def test_right_size_is_never_given_up_for_being_idle(make_arena: Make) -> None:
    arena = make_arena(buffers=3)
    for lease in [take(arena, LARGE) for _ in range(3)]:
        lease.release()
    used = {save(arena, LARGE - number) for number in range(50)}
    assert len(used) == 1
    assert sizes(arena) == [LARGE] * 3


@pytest.mark.parametrize("every", [2, 5, 16])
def test_alternating_sizes_keep_their_slabs(make_arena: Make, every: int) -> None:
    """Weights alone each time, the whole state every few times."""
    arena = make_arena(buffers=2)
    used = {save(arena, LARGE if number % every == 0 else SMALL) for number in range(100)}
    assert len(used) == 2
    assert sizes(arena) == [SMALL, LARGE]


def test_alternating_sizes_with_both_in_flight_create_nothing_new(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    held = take(arena, SMALL)
    used = {held.slab.slab_id}
    for number in range(60):
        following = take(arena, LARGE if number % 3 else SMALL)
        used.add(following.slab.slab_id)
        held.release()
        held = following
    assert len(used) == 4  # two small ones, then two large ones in their place, which serve both sizes
    assert sizes(arena) == [LARGE, LARGE]


def test_memory_is_free_although_another_process_holds_the_descriptor(make_arena: Make) -> None:
    """A forked data loader process does, and a worker until its next task."""
    arena = make_arena(buffers=2)
    lease = take(arena, LARGE)
    lease.slab.prefault()
    elsewhere = os.dup(lease.slab.fd)
    try:
        assert os.fstat(elsewhere).st_blocks * 512 == LARGE
        lease.release()
        mappings = _slab_mappings()
        for _ in range(16):
            save(arena, SMALL)
        wait_for_freeing(arena)
        assert os.fstat(elsewhere).st_blocks == 0
        assert _slab_mappings() == mappings
    finally:
        os.close(elsewhere)


def test_close_frees_the_memory_itself(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    arena.prepare(LARGE)
    lease = take(arena, LARGE)
    slab = lease.slab
    assert slab.allocated_nbytes == LARGE
    arena.close()
    assert slab.allocated_nbytes == LARGE  # in flight
    lease.release()
    assert slab.allocated_nbytes == 0
    assert arena.nbytes == 0


def test_slab_is_freed_here_when_no_thread_can_be_started(make_arena: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(buffers=1)
    take(arena, SMALL).release()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert take(arena, LARGE).nbytes == LARGE
    assert arena.nbytes == LARGE
