"""What the system cannot give: said before it is taken, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from stager.arena.arena import Arena
from stager.config import host
from stager.workers.errors import ArenaFullError, MemoryBudgetError
from tests import scripts
from tests.arena.conftest import MIB, sizes, start_waiting, take

Make = Callable[..., Arena]


class Host:
    """So many bytes are available, and how often that was asked."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.questions = 0

    def __call__(self) -> int:
        self.questions += 1
        return self.nbytes


def test_slab_that_the_system_has_no_memory_for_is_refused_in_numbers(make_arena: Make) -> None:
    arena = make_arena(available_bytes=Host(5 * MIB))
    with pytest.raises(MemoryBudgetError) as caught:
        arena.lease(6 * MIB)
    for part in (f"needs {6 * MIB:,} bytes", f"{5 * MIB:,} are available", f"arena.max_host_bytes allows {64 * MIB:,}"):
        assert part in str(caught.value)
    with pytest.raises(MemoryBudgetError):
        arena.prepare(6 * MIB)
    assert arena.nbytes == 0


def test_available_memory_is_asked_for_when_a_slab_is_created_only(make_arena: Make) -> None:
    system = Host(60 * MIB)
    arena = make_arena(buffers=2, available_bytes=system)
    for _ in range(10):
        first, second = take(arena, MIB), take(arena, MIB)
        with pytest.raises(ArenaFullError):
            arena.lease(MIB)
        arena.prepare_in_background(MIB)
        first.release()
        second.release()
    assert system.questions == 2


def test_memory_promised_to_slabs_not_filled_yet_is_not_given_away_twice(make_arena: Make) -> None:
    arena = make_arena(available_bytes=Host(10 * MIB))
    first = take(arena, 6 * MIB)
    with pytest.raises(ArenaFullError):  # one is in flight, which may be used again
        arena.lease(6 * MIB)
    first.slab.prefault()  # it takes memory now: the host here says that it has 10 MiB besides
    assert take(arena, 6 * MIB)


def test_fewer_slabs_serve_when_the_system_has_no_memory_for_more(
    make_arena: Make, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    arena = make_arena(buffers=2, available_bytes=Host(8 * MIB), when_full="wait")
    lease = take(arena, 6 * MIB)
    waiting = start_waiting(threads, arena, 6 * MIB)
    assert arena.lease(6 * MIB, "skip") is None
    lease.release()
    granted = waiting.result()
    assert granted is not None
    assert sizes(arena) == [6 * MIB]
    assert caplog.text.count("fewer snapshots can be in flight") == 1
    granted.release()


def test_memory_of_slabs_that_are_too_small_is_given_back_before_anything_is_refused(make_arena: Make) -> None:
    def available() -> int:
        return 8 * MIB - sum(buffer.slab.allocated_nbytes for buffer in arena._slabs.buffers)

    arena = make_arena(buffers=4, available_bytes=available)
    small = [take(arena, 2 * MIB) for _ in range(3)]
    for lease in small:
        lease.slab.prefault()
        lease.release()
    assert take(arena, 6 * MIB)
    assert sizes(arena) == [6 * MIB]


def test_growth_waits_for_what_is_in_flight_before_it_is_refused(make_arena: Make, threads: ThreadPoolExecutor) -> None:
    arena = make_arena(buffers=2, available_bytes=Host(3 * MIB), when_full="wait")
    small = take(arena, MIB)
    waiting = start_waiting(threads, arena, 4 * MIB)
    small.release()  # its memory might have been enough; it is not
    with pytest.raises(MemoryBudgetError):
        waiting.result()


def test_prepare_makes_as_many_as_there_is_memory_for(make_arena: Make, caplog: pytest.LogCaptureFixture) -> None:
    def available() -> int:
        return 8 * MIB - sum(buffer.slab.allocated_nbytes for buffer in arena._slabs.buffers)

    arena = make_arena(buffers=2, available_bytes=available)
    arena.prepare(6 * MIB)
    assert sizes(arena) == [6 * MIB]
    assert "1 of 2 buffers are prepared" in caplog.text


@pytest.mark.parametrize("of_cgroup", [12345, 1 << 60, None])
def test_available_memory_is_the_tighter_of_host_and_cgroup(
    of_cgroup: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.Cgroup, "memory_headroom_bytes", lambda _: of_cgroup)
    of_host = pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert host.available_memory_bytes() == (12345 if of_cgroup == 12345 else of_host)


LIMITED = """
import os, resource
from stager.arena.arena import Arena
arena = Arena(4, 1 << 50, "raise", available_bytes=lambda: 1 << 60)
num_fds = len(os.listdir("/proc/self/fd"))
for limit, value, nbytes in (
    (resource.RLIMIT_FSIZE, 1 << 20, 1 << 30),
    (resource.RLIMIT_NOFILE, num_fds, 1000),
    (resource.RLIMIT_AS, 1 << 36, 1 << 40),
):
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        arena.lease(nbytes)
    except Exception as error:
        print(type(error).__name__, error)
    resource.setrlimit(limit, before)
print(arena.nbytes, arena.lease(1000).slab.nbytes)
"""


def test_limits_of_the_process_are_named() -> None:
    done = scripts.run(LIMITED)
    assert done.returncode == 0
    file_size, descriptors, address_space, last = done.stdout.splitlines()
    assert file_size.startswith("MemoryBudgetError the kernel refused a buffer of 1,073,741,824 bytes")
    assert descriptors == "OSError [Errno 24] no descriptor is left for a buffer; raise `ulimit -n`"
    assert address_space.startswith("MemoryBudgetError the kernel refused a buffer of 1,099,511,627,776 bytes")
    assert last == "0 1000"
