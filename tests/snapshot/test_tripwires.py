"""What trips a wire and what does not: versions, samples, and writes that are not over when the copy is."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from stager import TornSnapshotError
from stager.snapshot import tripwires
from stager.snapshot.pieces import whole
from stager.snapshot.tripwires import wait_until_call_is_left
from stager.workers.memory.slab import Slab
from tests import fork_server
from tests.snapshot.staged import Bench, tensors_are_staged

LARGE = 3 << 18  # elements: several samples
SMALL = 1024


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(verify=False)
    yield bench
    bench.close()


def _stage(bench: Bench, state: dict[str, Any], between: Callable[[], object]) -> bool:
    """Arm, let something write, copy, check; whether the slab holds the state as it is now."""
    snapshot = bench.begin(state)
    pieces = whole(snapshot.plan, snapshot.blobs, 2)
    slab = Slab.create(pieces.slab_nbytes)
    now, later = bench.taker.split(snapshot, pieces, pieces.pieces[0])
    bench.taker.copy(snapshot, now, slab, cold=True, background=False)
    bench.taker.arm(snapshot, later)
    assert later.copies, "nothing is guarded"
    between()
    bench.taker.copy(snapshot, later, slab, cold=True, background=True)
    return tensors_are_staged(state, slab, snapshot.plan)


def test_write_through_data_to_all_of_a_tensor_trips_whatever_its_size_and_alignment(bench: Bench) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    bench.guard.add(optimizer)
    kinds = itertools.product([1, 3, 5, SMALL, LARGE], [torch.float32, torch.bfloat16, torch.uint8], [0, 1])
    for number, (numel, dtype, offset) in enumerate(kinds):
        tensor = torch.zeros(numel + offset, dtype=dtype)[offset:]  # need not begin at a word of 8 bytes
        optimizer.param_groups[0]["params"] = [torch.nn.Parameter(tensor, requires_grad=False)]
        state = {f"w{number}": tensor}
        assert _stage(bench, state, lambda: None)
        with pytest.raises(TornSnapshotError, match=rf"^w{number} changed"):
            _stage(bench, state, partial(tensor.data.fill_, 1))


def test_neighbours_of_a_tensor_do_not_trip(bench: Bench) -> None:
    base = torch.zeros(64, dtype=torch.uint8)
    tensor = base[9:14]
    optimizer = torch.optim.SGD([torch.nn.Parameter(tensor, requires_grad=False)], lr=0.1)
    bench.guard.add(optimizer)

    def write() -> None:
        base.data[:9] = 1
        base.data[14:] = 1

    assert _stage(bench, {"w": tensor}, write)


def test_inference_tensors_have_samples_though_no_versions(bench: Bench) -> None:
    with torch.inference_mode():
        moment = torch.zeros(SMALL)
    parameter = torch.nn.Parameter(torch.zeros(SMALL))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["momentum"] = moment
    bench.guard.add(optimizer)
    state = {"moment": moment, "w": parameter}
    assert _stage(bench, state, lambda: None)

    def write() -> None:
        with torch.inference_mode():
            moment.add_(1)

    with pytest.raises(TornSnapshotError, match="moment"):
        _stage(bench, state, write)


def _swap_memory(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value


def test_memory_that_a_tensor_is_parted_from_is_held_until_it_is_copied(bench: Bench) -> None:
    """4 MiB are mapped for themselves: once they are freed, reading them ends the process."""
    parameter = torch.nn.Parameter(torch.ones(1 << 20))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)
    storage = StorageWeakRef(parameter.untyped_storage())
    snapshot = bench.begin({"w": parameter})
    pieces = whole(snapshot.plan, snapshot.blobs, 2)
    slab = Slab.create(pieces.slab_nbytes)
    _, later = bench.taker.split(snapshot, pieces, pieces.pieces[0])
    bench.taker.arm(snapshot, later)
    _swap_memory(parameter, torch.zeros(1 << 20))
    assert not storage.expired(), "nothing holds the memory that is to be copied"
    bench.taker.copy(snapshot, later, slab, cold=True, background=True)
    assert tensors_are_staged({"w": torch.ones(1 << 20)}, slab, snapshot.plan)  # as it was at save()
    assert storage.expired()


def test_set_trips_by_name(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.ones(1 << 20))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)

    def write() -> None:
        with torch.no_grad():
            parameter.set_(torch.zeros(1 << 20))

    with pytest.raises(TornSnapshotError, match=r"^w changed"):
        _stage(bench, {"w": parameter}, write)


def test_storage_that_is_resized_trips_and_is_not_read(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.ones(1 << 20))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)
    with pytest.raises(TornSnapshotError, match=r"^w changed"):
        _stage(bench, {"w": parameter}, lambda: parameter.untyped_storage().resize_(0))


def test_write_trips_though_the_optimizers_tensor_has_other_memory_then(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)

    def write() -> None:
        with torch.no_grad():
            parameter[3] = 1  # no sample is there, and the leaf's version is its own
        _swap_memory(parameter, torch.zeros(1000))

    with pytest.raises(TornSnapshotError, match=r"^w changed"):
        _stage(bench, {"w": parameter.data}, write)


def test_tied_tensors_are_named_and_then_copied_at_once(bench: Bench) -> None:
    parameter = torch.nn.Parameter(torch.zeros(SMALL))
    other = torch.nn.Parameter(torch.zeros(SMALL))
    optimizer = torch.optim.SGD([parameter, other], lr=0.1)
    bench.guard.add(optimizer)
    state = {"a": parameter, "b": parameter.data, "other": other}
    with pytest.raises(TornSnapshotError, match=r"(?s)a.*b.*changed while"):
        _stage(bench, state, lambda: parameter.data.add_(1))
    snapshot = bench.begin(state)
    pieces = whole(snapshot.plan, snapshot.blobs, 2)
    _, later = bench.taker.split(snapshot, pieces, pieces.pieces[0])
    assert {snapshot.tree.name(leaf) for copy in later.copies for leaf in copy.leaves} == {"other"}


def test_write_to_a_dtensor_trips_though_its_local_tensor_has_no_new_version(tmp_path: Path) -> None:
    server, output = fork_server.shared(), tmp_path / "output"
    pid = server.start(f"{__name__}:write_to_a_dtensor", stdout=output, stderr=output)
    assert server.wait(pid) == 0, output.read_text()


def write_to_a_dtensor() -> None:
    """Runs in a child, which a process group leaves descriptors in."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sharded = distribute_tensor(torch.zeros(300, 32), init_device_mesh("cpu", (1,)), [Shard(0)])
    parameter = torch.nn.Parameter(sharded)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench = Bench(verify=False)
    bench.guard.add(optimizer)
    local = parameter.detach().to_local()
    version = local._version

    def write() -> None:
        with torch.no_grad():
            parameter.mul_(2)  # zeros stay zeros: no sample tells, as none need lie in a row that is written

    with pytest.raises(TornSnapshotError, match=r"^w changed"):
        _stage(bench, {"w": local}, write)
    assert local._version == version
    bench.close()
    dist.destroy_process_group()


def test_write_that_torch_has_not_ended_when_the_copy_ends_trips(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the trainer is inside of a call that has written a row and not counted the version up 2. the copy ends and its
    versions are unchanged 3. the call goes on and ends 4. only now the versions are right."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    bench.guard.add(optimizer)
    begin, go = os.pipe(), os.pipe()
    calls = [
        partial(parameter.detach().numpy().__setitem__, 3, 1.0),  # no sample is there
        partial(os.write, begin[1], b"x"),
        partial(os.read, go[0], 1),
        partial(torch._C._increment_version, [parameter]),
    ]
    errors: list[BaseException] = []

    def check(*arguments: Any) -> None:
        os.write(go[1], b"x")  # 3.
        wait_until_call_is_left(*arguments)

    monkeypatch.setattr(tripwires, "wait_until_call_is_left", check)
    snapshot = bench.begin({"w": parameter})
    pieces = whole(snapshot.plan, snapshot.blobs, 2)
    slab = Slab.create(pieces.slab_nbytes)

    def stage() -> None:
        os.read(begin[0], 1)  # 1.
        try:
            bench.taker.copy(snapshot, later, slab, cold=True, background=True)  # 2.
        except TornSnapshotError as error:
            errors.append(error)

    _, later = bench.taker.split(snapshot, pieces, pieces.pieces[0])
    thread = threading.Thread(target=stage)
    bench.taker.arm(snapshot, later)
    thread.start()
    deque(map(methodcaller("__call__"), calls), maxlen=0)  # one call, as a thread's Python code sees it
    thread.join()
    for fd in (*begin, *go):
        os.close(fd)
    assert len(errors) == 1


def test_thread_that_waits_for_a_lock_or_stays_where_it_is_is_not_waited_for() -> None:
    event = threading.Event()
    waiting = threading.Thread(target=event.wait)
    waiting.start()
    wait_until_call_is_left(waiting.ident or 0, 1e9)
    event.set()
    waiting.join()
    wait_until_call_is_left(waiting.ident or 0, 1e9)  # it has ended
    wait_until_call_is_left(threading.get_ident(), 1e9)
    fds = os.pipe()
    stuck = threading.Thread(target=os.read, args=(fds[0], 1))
    stuck.start()
    wait_until_call_is_left(stuck.ident or 0, 0.0)
    os.write(fds[1], b"x")
    stuck.join()
    for fd in fds:
        os.close(fd)


def test_tensor_with_gaps_guards_nothing(bench: Bench) -> None:
    """Its bytes from the first on are not all the optimizer's."""
    base = torch.zeros(100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(base[::2]), torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    bench.guard.add(optimizer)
    snapshot = bench.begin({"base": base[:50]})
    assert bench.guard.protects(snapshot.plan, snapshot.tree.leaves, bench.guard.tensors()).protected == [False]


def test_memory_is_looked_at_wherever_a_kernel_may_map_it() -> None:
    """Above 47 bits on 64-bit ARM, up to 56 on x86-64 with five levels of page tables."""
    assert tripwires._FIRST + tripwires._BYTES.nbytes >= 1 << 56
    assert tripwires._FIRST + tripwires._WORDS.nbytes >= 1 << 56
