"""Registering memory with CUDA, on a fake runtime: unregistered in time, and a failure to register is none to stage."""

from __future__ import annotations

import gc
import mmap
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.memory.host_buffers import HostBuffers
from tests import cuda_runtime


class FakeRuntime:
    """cudart: keeps the registered ranges, refuses what overlaps, fails on demand."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.fail_with = 0
        self.cleared = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.fail_with:
            return self.fail_with
        pages = range(address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE))
        for start, size in self.registered.items():
            other = range(start // mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE))
            if pages.start < other.stop and other.start < pages.stop:
                return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 713


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    fake = FakeRuntime()

    def clear() -> None:
        fake.cleared += 1

    cuda_runtime.install(monkeypatch, fake, clear)
    yield fake


@pytest.mark.parametrize("shared", [False, True])
def test_every_storage_is_whole_inside_a_registered_range(runtime: FakeRuntime, shared: bool) -> None:
    buffers = HostBuffers(shared=shared, pinned=True, pin_min_bytes=5)
    storages = [buffers.new(nbytes) for nbytes in (5, 64, 1000, 5000, 1 << 20, (1 << 20) + 1, 3 << 20)]
    for storage in storages:
        assert storage.is_shared() is shared
        assert any(
            start <= storage.data_ptr() and storage.data_ptr() + storage.nbytes() <= start + size
            for start, size in runtime.registered.items()
        )
    assert len(runtime.registered) == 4  # one slab, three of their own
    del storage, storages
    buffers.drop()
    gc.collect()
    assert runtime.registered == {}


def test_small_storages_are_not_pinned(runtime: FakeRuntime) -> None:
    HostBuffers(pinned=True, pin_min_bytes=100).new(99)
    assert runtime.registered == {}


@pytest.mark.parametrize("lease", [False, True])
def test_pinned_bytes_are_counted_and_none_of_small_storages(runtime: FakeRuntime, lease: bool) -> None:
    stager = StateDictStager(pin_memory=True, pin_memory_min_bytes=100, lease=lease)
    source = {"large": torch.ones(25), "larger": torch.ones(100), "small": torch.ones(24)}
    staged = stager.stage(source)
    assert stager.pinned_num_bytes() == 100 + 400
    del staged
    stager.close()
    assert stager.pinned_num_bytes() == 0 and runtime.registered == {}


@pytest.mark.parametrize("shared", [False, True])
def test_failure_to_register_warns_once_and_stages_unpinned(runtime: FakeRuntime, shared: bool) -> None:
    runtime.fail_with = 2  # cudaErrorMemoryAllocation
    source = {"w": torch.arange(10), "big": torch.ones(1 << 19)}
    with pytest.warns(RuntimeWarning, match=r"could not pin \d+ bytes .*CUDA error 2"):
        staged = StateDictStager(pin_memory=True, share_memory=shared).stage(source)
    assert all(torch.equal(staged[key], value) for key, value in source.items())
    assert runtime.cleared == 1  # nothing is left for the next kernel launch, and no second attempt was made
    assert runtime.registered == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StateDictStager(pin_memory=True, share_memory=shared).stage(source)


def test_memory_is_unregistered_before_it_is_unmapped(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped_at_the_time: list[bool] = []
    real = runtime.cudaHostUnregister

    def unregister(address: int) -> int:
        with open("/proc/self/maps") as maps:
            mapped_at_the_time.append(any(line.startswith(f"{address:x}-") for line in maps))
        return real(address)

    monkeypatch.setattr(runtime, "cudaHostUnregister", unregister)
    tensor: Any = StateDictStager(pin_memory=True, share_memory=True).stage(torch.ones(1 << 19))
    del tensor
    gc.collect()
    assert mapped_at_the_time == [True]
