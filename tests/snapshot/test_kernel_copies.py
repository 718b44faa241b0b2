"""Memory that is freed before it is copied, or while it is: an error, never the end of the process."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stager.snapshot import kernel_copies
from stager.snapshot.kernel_copies import MemoryGoneError, read, write
from stager.workers.errors import StorageError
from tests import scripts

PAGE = mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test")
    yield made
    os.close(made)


def vectors(*stretches: tuple[int, int]) -> Any:
    return np.array(stretches, dtype=np.uint64)


def gone() -> int:
    """An address at which nothing is mapped."""
    memory = mmap.mmap(-1, PAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    memory.close()
    return address


def test_stretches_are_read_one_behind_the_other_however_many() -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    begin, lengths = data.ctypes.data, [1 + number % 20 for number in range(5000)]
    starts = [number * 17 % 99_000 for number in range(5000)]
    found = read(vectors(*[(begin + start, nbytes) for start, nbytes in zip(starts, lengths, strict=True)]))
    assert found == b"".join(bytes(data[start : start + nbytes]) for start, nbytes in zip(starts, lengths, strict=True))


def test_memory_that_is_gone_is_an_error_wherever_it_is(fd: int) -> None:
    data = np.full(3 * PAGE, 7, np.uint8)
    there = data.ctypes.data
    for stretches in ([(gone(), 8)], [(there, PAGE), (gone(), 8), (there, 8)], [(0, 1)]):
        with pytest.raises(MemoryGoneError):
            write(fd, vectors(*stretches), 0)
        with pytest.raises(MemoryGoneError):
            read(vectors(*stretches))


def test_kernel_that_writes_less_than_asked_is_asked_again(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = kernel_copies._libc

    class Slow:
        """At most 7 bytes each time, and every other time it was interrupted."""

        calls = 0

        def pwritev(self, fd: int, address: int, count: int, offset: int) -> int:
            self.calls += 1
            if self.calls % 2:
                ctypes.set_errno(4)
                return -1
            first = np.ctypeslib.as_array((ctypes.c_uint64 * 2).from_address(address)).copy()
            first[1] = min(7, first[1])
            return int(libc.pwritev(fd, first.ctypes.data, 1, offset))

    monkeypatch.setattr(kernel_copies, "_libc", Slow())
    data = np.arange(100, dtype=np.uint8)
    begin = data.ctypes.data
    write(fd, vectors((begin, 20), (begin + 50, 1), (begin + 60, 40)), 3)
    assert os.pread(fd, 200, 0) == bytes(3) + bytes(data[:20]) + bytes(data[50:51]) + bytes(data[60:])


def test_other_refusals_of_the_kernel_are_told() -> None:
    data = np.zeros(8, np.uint8)
    with open(os.devnull) as not_writable, pytest.raises(StorageError, match="Bad file descriptor"):
        write(not_writable.fileno(), vectors((data.ctypes.data, 8)), 0)


PROGRAM = """
import itertools, os, sys, threading, torch
from stager import Checkpointer, TornSnapshotError
config = {"workers": {"count": 1}, "persistence": {"fsync": False}, "staging": {"verify": sys.argv[2] == "verify"}}
parameters = [torch.nn.Parameter(torch.full((1 << 20,), float(n))) for n in range(24)]  # 4 MiB each: mapped alone
small = [torch.nn.Parameter(torch.full((1000,), float(n))) for n in range(3000)]
optimizer = torch.optim.SGD([*parameters, *small], lr=0.1)
state = {"w": parameters, "small": small}
torn = 0
for number in range(5):
    with Checkpointer(sys.argv[1], config) as ckpt:  # each copies everything in the background
        ckpt.guard(optimizer)
        handle = ckpt.save(number, state)
        for _ in range(number * 40_000):  # later each time
            pass
        for parameter in parameters[::-1] if number % 2 else parameters:
            parameter.untyped_storage().resize_(0)
        try:
            handle.upload_completion.result()
        except TornSnapshotError as error:
            assert "w[" in str(error) and "small" not in str(error), error
            torn += 1
        for n, parameter in enumerate(parameters):
            parameter.untyped_storage().resize_(4 << 20)
            parameter.data.fill_(n)
    with Checkpointer(sys.argv[1], read_only=True) as reader:
        loaded = reader.load()
        if loaded is not None:
            assert all(torch.equal(w, torch.full_like(w, n)) for n, w in enumerate(loaded.state["w"]))
print("torn", torn)
"""


@pytest.mark.parametrize("verify", ["", "verify"])
def test_storages_that_are_resized_in_the_middle_of_a_copy_end_no_process(
    verify: str, run_dir: os.PathLike[str]
) -> None:
    """Without the kernel's copies this is a SIGSEGV, in most runs at the first save."""
    ended = scripts.run(PROGRAM, run_dir, verify)
    assert ended.returncode == 0
    assert int(ended.stdout.split()[1]) > 0
