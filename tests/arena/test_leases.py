"""Who gets a slab, in which order, and what happens when there is none."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stager.arena.arena import Arena, SlabState
from stager.workers.errors import ArenaFullError, ClosedError, InternalError, MemoryBudgetError
from tests.arena.conftest import MIB, num_waiting, sizes, start_waiting, take, wait_for_freeing
from tests.leaks import _slab_mappings

Make = Callable[..., Arena]


def test_slab_has_the_exact_size_and_is_used_again(make_arena: Make) -> None:
    arena = make_arena()
    lease = take(arena, 12_345)
    slab_id = lease.slab.slab_id
    assert (lease.nbytes, lease.slab.nbytes, arena.nbytes) == (12_345, 12_345, 12_345)
    lease.release()
    assert take(arena, 12_000).slab.slab_id == slab_id
    assert arena.live_slabs() == {slab_id}


def test_slab_in_use_is_never_leased_again(make_arena: Make) -> None:
    arena = make_arena(buffers=3)
    leases = [take(arena, 1000) for _ in range(3)]
    for lease in leases:
        lease.move(SlabState.STAGED)
        lease.move(SlabState.PERSISTING)
    assert len({lease.slab.slab_id for lease in leases}) == 3
    with pytest.raises(ArenaFullError, match="all 3 buffers hold snapshots that are not committed yet"):
        arena.lease(1000)
    second = leases[1].slab.slab_id
    leases[1].release()
    assert take(arena, 1000).slab.slab_id == second


def test_slab_that_somebody_else_still_reads_is_not_leased_again(make_arena: Make) -> None:
    arena = make_arena(buffers=1, when_full="raise")
    for release_first in (True, False):
        lease = arena.lease(4096)
        assert lease is not None
        let_go = [lease.hold(), lease.hold()]
        order = [lease.release, *let_go] if release_first else [*let_go, lease.release]
        for step in order:
            with pytest.raises(ArenaFullError):
                arena.lease(4096)
            step()
            if step is not order[-1]:
                step()  # once more is no other holder's
        with pytest.raises(InternalError):
            lease.hold()
    again = arena.lease(4096)
    assert again is not None
    again.release()


def test_full_arena_follows_the_policy_or_the_calls_own(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=1, when_full="skip")
    lease = take(arena, 1000)
    assert arena.lease(1000) is None
    with pytest.raises(ArenaFullError):
        arena.lease(1000, "raise")
    waiting = start_waiting(threads, arena, 1000, "wait")
    lease.release()
    granted = waiting.result()
    assert granted is not None
    granted.release()
    assert num_waiting(arena) == 0


def test_waiting_leases_are_granted_in_the_order_of_asking(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=1, when_full="wait")
    held = take(arena, 1000)
    waiting = [start_waiting(threads, arena, 1000) for _ in range(8)]
    for number, future in enumerate(waiting):
        held.release()
        granted = future.result()
        assert granted is not None
        held = granted
        assert [later.done() for later in waiting[number + 1 :]] == [False] * (7 - number)


def test_small_lease_does_not_overtake_a_large_one(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=2, max_bytes=10 * MIB, when_full="wait")
    large, small = take(arena, 8 * MIB), take(arena, MIB)
    first = start_waiting(threads, arena, 8 * MIB)
    small.release()  # room for a small one, but the large one was there before
    assert arena.lease(MIB, "skip") is None
    second = start_waiting(threads, arena, MIB)
    assert not first.done()
    large.release()
    assert first.result() is not None
    assert second.result() is not None


def test_close_wakes_every_lease_that_waits(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=1, when_full="wait")
    lease = take(arena, 1000)
    waiting = [start_waiting(threads, arena, 1000) for _ in range(4)]
    arena.close()
    for future in waiting:
        with pytest.raises(ClosedError):
            future.result()
    with pytest.raises(ClosedError):
        arena.lease(1000)
    with pytest.raises(ClosedError):
        arena.prepare(1000)
    assert arena.nbytes == 1000  # its snapshot may still be read
    lease.release()
    assert arena.nbytes == 0
    arena.close()


def test_lease_that_waits_gives_up_at_a_deadline_that_was_set_meanwhile(
    make_arena: Make, threads: ThreadPoolExecutor
) -> None:
    """The deadline comes with a signal, whose handler tells nobody."""
    arena = make_arena(buffers=1, when_full="wait")
    lease = take(arena, 1000)
    asked, remaining = threading.Event(), [None, None, 0.01, 0.0]

    def remaining_secs() -> float | None:
        asked.set()
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    arena.wait_no_longer_than(remaining_secs)
    waiting = start_waiting(threads, arena, 1000)
    asked.wait()
    with pytest.raises(ArenaFullError, match="given to on_preemption"):
        waiting.result()
    assert num_waiting(arena) == 0
    lease.release()
    take(arena, 1000).release()  # what need not wait is granted


def test_lease_that_waits_can_be_interrupted(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=1, when_full="wait")
    lease = take(arena, 1000)
    with pytest.raises(MemoryBudgetError):  # any error, thrown while the others wait
        arena.lease(65 * MIB)
    waiting = start_waiting(threads, arena, 1000)
    assert num_waiting(arena) == 1
    lease.release()
    assert waiting.result() is not None


def test_what_exceeds_the_budget_is_refused_before_anything_is_allocated(make_arena: Make) -> None:
    arena = make_arena(max_bytes=1000)
    take(arena, 600).release()
    with pytest.raises(
        MemoryBudgetError, match=r"needs 1,001 bytes of host memory, and arena.max_host_bytes allows 1,000"
    ):
        arena.lease(1001)
    with pytest.raises(MemoryBudgetError, match=r"1,001"):
        arena.prepare(1001)
    assert sizes(arena) == [600]
    assert arena.max_slab_nbytes == 1000


def test_budget_holds_fewer_slabs_than_buffers(make_arena: Make, caplog: pytest.LogCaptureFixture) -> None:
    arena = make_arena(buffers=4, max_bytes=10 * MIB)
    leases = [take(arena, 4 * MIB), take(arena, 4 * MIB)]
    with pytest.raises(ArenaFullError):
        arena.lease(4 * MIB)
    assert arena.nbytes == 8 * MIB
    assert caplog.text.count("only 2 snapshots") == 1
    leases[0].release()
    assert take(arena, 4 * MIB)


def test_chunks_of_the_budget_can_all_be_in_flight(make_arena: Make) -> None:
    arena = make_arena(buffers=3, max_bytes=10 * MIB)
    leases = [take(arena, arena.piece_nbytes) for _ in range(3)]
    assert arena.nbytes == 3 * arena.piece_nbytes <= 10 * MIB
    assert arena.piece_nbytes % os.sysconf("SC_PAGESIZE") == 0
    for lease in leases:
        lease.release()


def test_a_thousand_leases_leave_descriptors_and_mappings_where_they_were(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    counts = set()
    for number in range(1000):
        lease = take(arena, 100_000 + number % 7)
        lease.move(SlabState.STAGED)
        lease.move(SlabState.PERSISTING)
        lease.release()
        if number % 100 == 99:
            wait_for_freeing(arena)
            counts.add((len(os.listdir("/proc/self/fd")), _slab_mappings(), arena.nbytes))
    assert len(counts) == 1


def test_threads_never_share_a_slab(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=3, when_full="wait")
    begin = threading.Barrier(6)

    def work(mark: int) -> int:
        begin.wait(60)
        seen = 0
        for number in range(100):
            nbytes = 5000 if number % 3 else 2 * MIB
            lease = take(arena, nbytes)
            lease.slab.view[:4000] = bytes([mark]) * 4000
            lease.move(SlabState.STAGED)
            lease.move(SlabState.PERSISTING)
            seen += lease.slab.view[:4000] == bytes([mark]) * 4000
            lease.release()
        return seen

    assert list(threads.map(work, range(1, 7))) == [100] * 6
    assert arena.nbytes <= 64 * MIB


def test_arena_that_nobody_closed_goes_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        before = _slab_mappings()
        arena = Arena(2, MIB, "raise")
        arena.prepare_in_background(1000)
        arena._prefaulter.join()
        assert _slab_mappings() == before + 2
        del arena
        assert _slab_mappings() == before
    finally:
        gc.enable()
