"""Pages allocated ahead of their use."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stager.arena import prefault
from stager.arena.arena import Arena, SlabState
from stager.workers.errors import MemoryBudgetError
from stager.workers.memory.slab import Slab
from tests.arena.conftest import (
    MIB,
    Gate,
    num_waiting,
    populate_by,
    sizes,
    start_waiting,
    take,
    wait_for_prefault,
)
from tests.waiting import wait_until

Make = Callable[..., Arena]


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux before 5.14: no MADV_POPULATE_WRITE."""
    populate_by(monkeypatch, lambda populate: errno.EINVAL)


def refuse_memory(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """The kernel runs out of memory after so many steps."""
    steps = iter(range(after))
    populate_by(monkeypatch, lambda populate: errno.ENOMEM if next(steps, None) is None else populate())


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 16 * MIB, 40 * MIB + 1])
def test_every_page_is_allocated(num_threads: int, nbytes: int) -> None:
    slab = Slab.create(nbytes)
    assert slab.allocated_nbytes == 0
    slab.prefault(num_threads=num_threads)
    assert slab.warm_nbytes == nbytes
    assert slab.allocated_nbytes == -(-nbytes // 4096) * 4096
    slab.give_back()
    assert (slab.warm_nbytes, slab.allocated_nbytes) == (0, 0)


@pytest.mark.usefixtures("old_kernel")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_pages_are_touched_where_the_kernel_cannot_populate(num_threads: int) -> None:
    slab = Slab.create(40 * MIB + 1)
    slab.view[20 * MIB : 20 * MIB + 5] = b"there"
    slab.prefault(num_threads=num_threads)
    assert slab.warm_nbytes == 40 * MIB + 1
    assert slab.allocated_nbytes == 40 * MIB + 4096
    assert bytes(slab.view[20 * MIB : 20 * MIB + 5]) == b"there"


@pytest.mark.usefixtures("old_kernel")
def test_range_that_cannot_be_populated_keeps_what_is_in_it() -> None:
    slab = Slab.create(10_000)
    slab.view[:10_000] = bytes([7]) * 10_000
    slab.populate(5_000, 5_000)
    assert bytes(slab.view) == bytes([7]) * 10_000


def test_range_is_populated_by_whole_pages_and_keeps_what_is_in_them() -> None:
    slab = Slab.create(4 * 4096)
    slab.view[4096:4106] = b"0123456789"
    slab.populate(4106, 4096)
    assert slab.allocated_nbytes == 2 * 4096
    assert bytes(slab.view[4096:4107]) == b"0123456789\0"


def test_interrupted_prefault_says_how_far_it_came_and_goes_on_from_there() -> None:
    slab = Slab.create(64 * MIB)
    answers = iter([True, True, False])
    slab.prefault(lambda: next(answers))
    assert slab.warm_nbytes == slab.allocated_nbytes == 32 * MIB
    slab.prefault()
    assert slab.warm_nbytes == slab.allocated_nbytes == 64 * MIB


@pytest.mark.parametrize("num_threads", [1, 3])
def test_memory_that_the_kernel_refuses_is_a_memory_error(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    refuse_memory(monkeypatch, after=1)
    with pytest.raises(MemoryError, match=r"refused .* bytes of shared memory: Cannot allocate memory"):
        Slab.create(64 * MIB).prefault(num_threads=num_threads)


def test_prepared_arena_leases_warm_slabs(make_arena: Make) -> None:
    arena = make_arena(buffers=3)
    arena.prepare(MIB)
    assert sizes(arena) == [MIB] * 3
    leases = [take(arena, MIB) for _ in range(3)]
    assert all(lease.warm for lease in leases)
    for lease in leases:
        lease.release()


def test_lease_knows_whether_its_own_bytes_are_warm(make_arena: Make) -> None:
    arena = make_arena(buffers=1)
    lease = take(arena, 3 * MIB)
    assert not lease.warm
    lease.release()  # a save that failed: nobody knows what was written
    lease = take(arena, 2 * MIB)
    assert not lease.warm
    lease.move(SlabState.STAGED)
    lease.release()
    lease = take(arena, 2 * MIB)
    assert lease.warm
    lease.release()
    assert not take(arena, 3 * MIB).warm


def test_prepare_warms_what_is_there_and_replaces_what_is_too_small(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    cold, small = take(arena, 5 * MIB), take(arena, MIB)
    kept = cold.slab.slab_id
    cold.release()
    small.release()
    arena.prepare(5 * MIB)
    assert sizes(arena) == [5 * MIB] * 2
    leases = [take(arena, 5 * MIB), take(arena, 5 * MIB)]
    assert all(lease.warm for lease in leases)
    assert kept in {lease.slab.slab_id for lease in leases}


def test_prepare_leaves_slabs_in_use_alone(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    lease = take(arena, MIB)
    arena.prepare(5 * MIB)
    assert sizes(arena) == [MIB, 5 * MIB]
    assert not lease.warm


def test_prepare_in_background_fills_the_room_there_is(make_arena: Make) -> None:
    arena = make_arena(buffers=3)
    lease = take(arena, MIB)
    arena.prepare_in_background(MIB)
    wait_for_prefault()
    assert sizes(arena) == [MIB] * 3
    assert [take(arena, MIB).warm for _ in range(2)] == [True, True]
    arena.prepare_in_background(MIB)  # nothing to do
    assert not lease.warm


def test_prepare_in_background_takes_nobodys_place(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    for lease in [take(arena, MIB), take(arena, MIB)]:
        lease.release()
    arena.prepare_in_background(5 * MIB)
    wait_for_prefault()
    assert sizes(arena) == [MIB, MIB]


@pytest.mark.parametrize("options", [{"prefault": False}, {"max_bytes": 40 * MIB}])
def test_no_spare_is_prepared_when_it_is_not_wanted_or_does_not_fit(make_arena: Make, options: dict[str, int]) -> None:
    arena = make_arena(**options)
    take(arena, 30 * MIB)
    arena.prepare_in_background(30 * MIB)
    wait_for_prefault()
    assert sizes(arena) == [30 * MIB]


@pytest.mark.parametrize("when_full", ["wait", "skip", "raise"])
def test_lease_does_not_wait_until_a_spare_is_whole(
    make_arena: Make, gate: Gate, threads: ThreadPoolExecutor, when_full: str
) -> None:
    """1. One slab is in flight. 2. The other is being prefaulted. 3. A lease comes: it gets that one as it is."""
    arena = make_arena(buffers=2, when_full=when_full)
    take(arena, 32 * MIB)
    arena.prepare_in_background(32 * MIB)
    assert gate.reached.wait(60)
    waiting = start_waiting(threads, arena, 32 * MIB)
    gate.open()
    lease = waiting.result()
    assert lease is not None
    assert lease.slab.warm_nbytes == 16 * MIB  # the step that was under way
    assert not lease.warm
    wait_for_prefault()


def test_close_stops_the_prefault(make_arena: Make, gate: Gate, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=2)
    arena.prepare_in_background(32 * MIB)
    assert gate.reached.wait(60)
    closing = threads.submit(arena.close)
    wait_until(lambda: arena._slabs.closed)
    gate.open()
    closing.result()
    assert arena.nbytes == 0


def test_prepare_waits_for_the_background(make_arena: Make, gate: Gate, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=2)
    arena.prepare_in_background(MIB)
    assert gate.reached.wait(60)
    preparing = threads.submit(arena.prepare, MIB)
    wait_until(lambda: len(sizes(arena)) == 2)
    gate.open()
    preparing.result()
    assert sizes(arena) == [MIB] * 2
    assert all(take(arena, MIB).warm for _ in range(2))


def test_prepare_takes_over_what_the_background_has_begun(make_arena: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The background's thread is slow: it allocates nothing until it is told to stop."""
    real = Slab.prefault

    def prefault_slowly(slab: Slab, keep_going: Callable[[], bool], num_threads: int = 1) -> None:
        if threading.current_thread().name == "stager-prefault":
            wait_until(lambda: not keep_going())
        else:
            real(slab, keep_going, num_threads)

    monkeypatch.setattr(Slab, "prefault", prefault_slowly)
    arena = make_arena(buffers=2)
    arena.prepare_in_background(20 * MIB)
    wait_until(lambda: sizes(arena) == [20 * MIB])
    arena.prepare(20 * MIB)
    assert sizes(arena) == [20 * MIB] * 2
    for lease in [take(arena, 20 * MIB) for _ in range(2)]:
        assert lease.warm
        lease.release()


def test_half_a_slab_is_given_back_when_memory_runs_out(make_arena: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(buffers=1)
    refuse_memory(monkeypatch, after=1)
    with pytest.raises(MemoryBudgetError, match="Cannot allocate memory; free memory on this host"):
        arena.prepare(32 * MIB)
    wait_until(lambda: arena.nbytes == 0)


def test_background_asks_again_some_saves_later(
    make_arena: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arena = make_arena(buffers=2)
    take(arena, MIB)
    with monkeypatch.context() as patch:
        refuse_memory(patch)
        arena.prepare_in_background(MIB)
        wait_for_prefault()
    assert "no buffer was prepared ahead of the next save" in caplog.text
    wait_until(lambda: sizes(arena) == [MIB])
    for _ in range(prefault._SKIPPED_AFTER_REFUSAL):
        arena.prepare_in_background(MIB)
        wait_for_prefault()
        assert sizes(arena) == [MIB]
    arena.prepare_in_background(MIB)
    wait_for_prefault()
    assert sizes(arena) == [MIB, MIB]


def test_background_has_a_low_priority(make_arena: Make, gate: Gate) -> None:
    arena = make_arena()
    arena.prepare_in_background(MIB)
    assert gate.reached.wait(60)
    thread = next(t for t in threading.enumerate() if t.name == "stager-prefault")
    assert thread.native_id is not None
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert own == os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == min(19, own + 10)
    gate.open()
    wait_for_prefault()
    assert num_waiting(arena) == 0


def test_a_spare_is_not_prepared_where_no_thread_can_be_had(make_arena: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    arena = make_arena()
    with monkeypatch.context() as refusing:
        refusing.setattr(threading.Thread, "start", refuse)
        arena.prepare_in_background(MIB)
    arena.lease(MIB).release()
    arena.close()
