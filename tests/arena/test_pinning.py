"""Slabs registered with CUDA, on a fake runtime: whole, once, and never still registered when they are unmapped."""

# ``runtime`` comes before ``make_arena`` in every signature: the slabs go while it is still there to be told.

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest

from stager.arena.arena import Arena
from stager.workers.device import host_memory
from tests import cuda_runtime
from tests.arena.conftest import MIB, sizes, take, wait_for_freeing
from tests.staging.test_pinning import FakeRuntime

Make = Callable[..., Arena]


class WatchfulRuntime(FakeRuntime):
    """Notes what was no longer mapped when it was unregistered, and can refuse after so many registrations."""

    def __init__(self) -> None:
        super().__init__()
        self.too_late: list[int] = []
        self.accept = 1 << 30
        self.calls = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls += 1
        return 2 if self.calls > self.accept else super().cudaHostRegister(address, nbytes, flags)

    def cudaHostUnregister(self, address: int) -> int:
        if not _is_mapped(address):
            self.too_late.append(address)
        return super().cudaHostUnregister(address)


def _is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split(maxsplit=1)[0].split("-")] for line in maps]
    return any(start <= address < end for start, end in ranges)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> WatchfulRuntime:
    fake = WatchfulRuntime()

    def clear() -> None:
        fake.cleared += 1

    cuda_runtime.install(monkeypatch, fake, clear)
    monkeypatch.setattr(host_memory, "_CHUNK_BYTES", MIB)
    return fake


def test_slab_is_registered_whole_once_and_until_it_goes(runtime: WatchfulRuntime, make_arena: Make) -> None:
    arena = make_arena(buffers=1, pin=True)
    for _ in range(5):
        lease = take(arena, 3 * MIB + 5)
        assert sorted(runtime.registered) == [lease.slab.address + n * MIB for n in range(4)]
        assert sum(runtime.registered.values()) == 3 * MIB + 5
        lease.release()
    assert runtime.calls == 4
    arena.close()
    gc.collect()
    assert (runtime.registered, runtime.too_late) == ({}, [])


def test_retired_slab_is_unregistered_before_it_is_unmapped(runtime: WatchfulRuntime, make_arena: Make) -> None:
    arena = make_arena(buffers=1, pin=True)
    lease = take(arena, 2 * MIB)
    lease.release()
    del lease
    grown = take(arena, 8 * MIB)
    wait_for_freeing(arena)
    gc.collect()
    assert sum(runtime.registered.values()) == 8 * MIB
    assert min(runtime.registered) == grown.slab.address
    grown.release()
    arena.close()
    del grown
    gc.collect()
    assert (runtime.registered, runtime.too_late) == ({}, [])


def test_prepared_slabs_are_registered_after_their_pages_are_there(runtime: WatchfulRuntime, make_arena: Make) -> None:
    allocated: list[int] = []
    real = runtime.cudaHostRegister

    def register(address: int, nbytes: int, flags: int) -> int:
        allocated.append(max(buffer.slab.allocated_nbytes for buffer in arena._slabs.buffers))
        return real(address, nbytes, flags)

    runtime.cudaHostRegister = register
    arena = make_arena(buffers=2, pin=True)
    arena.prepare(MIB)
    assert allocated == [MIB, MIB]
    assert sizes(arena) == [MIB, MIB]
    arena.prepare(MIB)
    take(arena, MIB).release()
    assert len(allocated) == 2  # once each
    del runtime.cudaHostRegister  # it keeps the arena


@pytest.mark.parametrize("accept", [0, 1, 3])
def test_refused_registration_leaves_a_usable_slab_one_warning_and_no_error_behind(
    runtime: WatchfulRuntime, make_arena: Make, accept: int
) -> None:
    runtime.accept = accept
    arena = make_arena(buffers=2, pin=True)
    with pytest.warns(RuntimeWarning, match="could not pin"):
        lease = take(arena, 4 * MIB)
    assert len(runtime.registered) == accept
    assert runtime.cleared == 1
    lease.slab.view[:5] = b"bytes"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = take(arena, 4 * MIB)  # tried, cleared, not warned about again
    assert runtime.cleared == 2
    other.release()
    lease.release()
    arena.close()
    del lease, other
    gc.collect()
    assert (runtime.registered, runtime.too_late) == ({}, [])


def test_warning_that_is_an_error_does_not_lose_the_slab(runtime: WatchfulRuntime, make_arena: Make) -> None:
    runtime.accept = 0
    arena = make_arena(buffers=1, pin=True)
    with pytest.raises(RuntimeWarning, match="could not pin"):  # the test suite turns warnings into errors
        arena.lease(MIB)
    assert take(arena, MIB)  # unpinned
    assert runtime.calls == 1
