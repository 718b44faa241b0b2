"""Memory that is freed before it is copied, or while it is: an error, never the end of the process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stager import TornSnapshotError
from stager.snapshot import copying, kernel_copies
from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier
from stager.snapshot.kernel_copies import MemoryGoneError, Scratch, read_into, vectors, write
from stager.snapshot.pieces import whole
from stager.state.copies import Copy
from stager.workers.device.byte_copies import stretch_of
from stager.workers.errors import StorageError
from stager.workers.memory.slab import Slab
from tests import scripts
from tests.snapshot.staged import Bench

PAGE = mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test")
    yield made
    os.close(made)


def read(stretches: Sequence[tuple[int, int]]) -> bytes:
    with Scratch() as scratch:
        return scratch.read(vectors(stretches))


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
    found = read([(begin + start, nbytes) for start, nbytes in zip(starts, lengths, strict=True)])
    assert found == b"".join(bytes(data[start : start + nbytes]) for start, nbytes in zip(starts, lengths, strict=True))


def test_memory_that_is_gone_is_an_error_wherever_it_is(fd: int) -> None:
    data = np.full(3 * PAGE, 7, np.uint8)
    there = data.ctypes.data
    for stretches in ([(gone(), 8)], [(there, PAGE), (gone(), 8), (there, 8)], [(0, 1)]):
        with pytest.raises(MemoryGoneError) as caught:
            write(fd, vectors(stretches), 0)
        assert caught.value.address == next(address for address, _ in stretches if address != there)
        with pytest.raises(MemoryGoneError):
            read(stretches)


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
    write(fd, vectors([(begin, 20), (begin + 50, 1), (begin + 60, 40)]), 3)
    assert os.pread(fd, 200, 0) == bytes(3) + bytes(data[:20]) + bytes(data[50:51]) + bytes(data[60:])


def test_other_refusals_of_the_kernel_are_told() -> None:
    data = np.zeros(8, np.uint8)
    with open(os.devnull) as not_writable, pytest.raises(StorageError, match="Bad file descriptor"):
        write(not_writable.fileno(), vectors([(data.ctypes.data, 8)]), 0)


def test_no_stretch_and_an_empty_one_are_nothing(fd: int) -> None:
    write(fd, vectors([]), 0)
    write(fd, vectors([(1, 0), (2, 0)]), 0)
    assert read([]) == b"" == os.pread(fd, 1, 0)


@pytest.mark.parametrize("answer", [0, -errno.ENOSPC])
def test_kernel_without_memory_or_progress_does_not_hold_up_anybody(
    fd: int, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def pwritev(*_: object) -> int:
        ctypes.set_errno(-answer)
        return min(answer, 0) and -1

    monkeypatch.setattr(kernel_copies, "_libc", SimpleNamespace(pwritev=pwritev))
    data = np.zeros(8, np.uint8)
    with pytest.raises(MemoryError if answer else StorageError):
        write(fd, vectors([(data.ctypes.data, 8)]), 0)


# -- copies that several threads make at the same time ---------------------------------------------------------------


def test_memory_is_copied_to_memory_and_what_is_gone_is_an_error() -> None:
    source, target = np.arange(5 * PAGE, dtype=np.uint32), np.zeros(5 * PAGE, dtype=np.uint32)
    there, here = source.ctypes.data, target.ctypes.data
    assert read_into(here + 4, there + 8, 4 * PAGE) == 4 * PAGE
    assert (target[1 : 1 + PAGE] == source[2 : 2 + PAGE]).all() and target[0] == 0 and not target[1 + PAGE :].any()
    memory = mmap.mmap(-1, 3 * PAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address + PAGE), PAGE)  # a hole in the middle
    with pytest.raises(MemoryGoneError):
        read_into(here, address, 3 * PAGE)
    assert ctypes.CDLL(None).mmap(
        ctypes.c_void_p(address + PAGE), PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10, -1, 0
    )  # so that nothing else comes there before ``memory`` is unmapped as a whole
    memory.close()


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.ESRCH, errno.EINVAL])
def test_copy_that_is_interrupted_or_short_goes_on_and_a_refusal_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    libc, answers = kernel_copies._libc, [errno.EINTR, None, refusal]

    def process_vm_readv(pid: int, to: int, to_count: int, source: int, count: int, flags: int) -> int:
        if answer := answers.pop(0):
            ctypes.set_errno(answer)
            return -1
        for vector in (to, source):
            np.ctypeslib.as_array((ctypes.c_uint64 * 2).from_address(vector))[1] = 7
        return int(libc.process_vm_readv(pid, to, to_count, source, count, flags))

    monkeypatch.setattr(kernel_copies, "_libc", SimpleNamespace(process_vm_readv=process_vm_readv))
    source, target = np.arange(20, dtype=np.uint8), np.zeros(20, np.uint8)
    assert read_into(target.ctypes.data, source.ctypes.data, 20) == 7
    assert target.tolist() == [*range(7), *[0] * 13]


@pytest.mark.parametrize("refused", [False, True])
def test_guarded_copies_of_several_threads_are_whole_whether_or_not_the_kernel_lets_them_share(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """In slabs with and without pages; stretches of more than one piece, and small ones."""
    if refused:
        libc = kernel_copies._libc

        def process_vm_readv(*_: object) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

        monkeypatch.setattr(
            kernel_copies, "_libc", SimpleNamespace(pwritev=libc.pwritev, process_vm_readv=process_vm_readv)
        )
    tensors = [torch.randn(size) for size in (5 << 20, 1 << 20, 300_000, 10, 1_000, 3)]
    address = 0
    copies = []
    for number, tensor in enumerate(tensors):
        nbytes = tensor.untyped_storage().nbytes()
        copies.append(Copy(number, tensor.data_ptr(), address, nbytes, (number,), True))
        address += -(-nbytes // 64) * 64
    copier = Copier(1, num_background_threads=3)
    for cold in (True, False):
        slab = Slab.create(address)
        if not cold:
            slab.prefault()
        copier.copy(batch(copies), tensors, slab, cold=cold, background=True)
        for copy, tensor in zip(copies, tensors, strict=True):
            staged = bytes(ctypes.string_at(slab.address + copy.slab_offset, copy.nbytes))
            assert staged == tensor.numpy().tobytes()
    copier.close()


# -- storages that are resized between save() and the copy ---------------------------------------------------------


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(verify=False)
    yield bench
    bench.close()


class Late:
    """A guarded tensor whose copy has not begun."""

    def __init__(self, bench: Bench, numel: int = 10_000) -> None:
        self.bench, self.parameter = bench, torch.nn.Parameter(torch.ones(numel))
        self.optimizer = torch.optim.SGD([self.parameter], lr=0.1)
        bench.guard.add(self.optimizer)
        self.state = {"w": self.parameter}

    def stage(self, meanwhile: Callable[[torch.UntypedStorage], object]) -> int:
        """How many copies were made late; what happens before them is ``meanwhile``."""
        taker, snapshot = self.bench.taker, self.bench.begin(self.state)
        pieces = whole(snapshot.plan, snapshot.blobs, 2)
        slab = Slab.create(pieces.slab_nbytes)
        now, later = taker.split(snapshot, pieces, pieces.pieces[0])
        taker.copy(snapshot, now, slab, cold=True, background=False)
        taker.arm(snapshot, later)
        meanwhile(self.parameter.untyped_storage())
        taker.copy(snapshot, later, slab, cold=True, background=True)
        return len(later.copies)


@pytest.mark.parametrize("nbytes", [20_064, 39_999, 40_001, 400_000])
def test_storage_of_another_size_is_refused_though_its_address_may_be_the_same(bench: Bench, nbytes: int) -> None:
    def resize(storage: torch.UntypedStorage) -> None:
        storage.resize_(0)
        storage.resize_(nbytes)

    late = Late(bench)
    with pytest.raises(TornSnapshotError, match=r"^w changed"):
        late.stage(resize)
    late.parameter.untyped_storage().resize_(40_000)
    assert late.stage(lambda storage: None) == 0  # it is copied before save() returns from now on


def test_memory_that_is_gone_and_there_again_is_refused_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its storage looks as before when somebody looks."""

    def write_nothing(fd: int, stretches: Any, offset: int) -> None:
        raise MemoryGoneError(int(stretches[-1, 0]))

    late = Late(bench)
    with monkeypatch.context() as patch, pytest.raises(TornSnapshotError, match=r"^w changed"):
        late.stage(lambda storage: patch.setattr(copying, "write", write_nothing))
    assert late.stage(lambda storage: None) == 0


def test_other_errors_that_a_resized_storage_causes_are_told_as_what_they_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(bench)

    def write_resized(fd: int, stretches: Any, offset: int) -> None:
        late.parameter.untyped_storage().resize_(0)
        raise RuntimeError("data is not allocated yet")

    with monkeypatch.context() as patch, pytest.raises(TornSnapshotError, match=r"^w changed"):
        late.stage(lambda storage: patch.setattr(copying, "write", write_resized))


def test_view_of_a_storage_does_not_enlarge_it() -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    address = tensor.data_ptr()
    assert stretch_of(tensor, address + 90, 10).numel() == 10
    for start, nbytes in ((0, 101), (91, 10), (-1, 1)):
        with pytest.raises(RuntimeError, match="was resized"):
            stretch_of(tensor, address + start, nbytes)
    assert tensor.untyped_storage().nbytes() == 100


PROGRAM = """
import sys, torch
from stager import Checkpointer, TornSnapshotError
staging = {"verify": sys.argv[2] == "verify", "background_threads": 3 if sys.argv[2] == "threads" else "auto"}
config = {"workers": {"count": 1}, "persistence": {"fsync": False}, "staging": staging}
parameters = [torch.nn.Parameter(torch.full((1 << 20,), float(n))) for n in range(24)]  # 4 MiB each: mapped alone
small = [torch.nn.Parameter(torch.full((1000,), float(n))) for n in range(3000)]
optimizer = torch.optim.SGD([*parameters, *small], lr=0.1)
state = {"w": parameters, "small": small}
torn = 0
for number in range(5):
    with Checkpointer(sys.argv[1], config) as ckpt:  # each copies everything in the background
        ckpt.guard(optimizer)
        if sys.argv[2] == "threads":
            ckpt.warmup(state)  # so that the pages of the slab are there
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


@pytest.mark.parametrize("how", ["", *(pytest.param(how, marks=pytest.mark.long) for how in ("verify", "threads"))])
def test_storages_that_are_resized_in_the_middle_of_a_copy_end_no_process(how: str, run_dir: os.PathLike[str]) -> None:
    """Without the kernel's copies this is a SIGSEGV, in most runs at the first save."""
    ended = scripts.run(PROGRAM, run_dir, how)
    assert ended.returncode == 0
    assert int(ended.stdout.split()[1]) > 0
