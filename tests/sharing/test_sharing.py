"""What the workers copy of a state, what stays the trainer's, and that the bytes are right either way."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stager.sharing import movable
from stager.workers import WorkerPool
from stager.workers.memory import shared_source
from tests.pool import tasks
from tests.sharing.snapshots import MIB, Snapshots, random_bytes


def test_snapshot_by_workers_equals_the_source(pool: WorkerPool) -> None:
    """Aliases and views, several dtypes, an offset in the storage, more than one piece, odd sizes, small ones between."""
    base = random_bytes(40 * MIB + 5)
    state = {
        "base": base,
        "view": base[3 * MIB + 3 : 20 * MIB],
        "small": torch.arange(100),
        "half": random_bytes(MIB).view(torch.bfloat16),
        "complex": torch.randn(1 << 16, dtype=torch.complex64),
        "tail": random_bytes(2 * MIB)[MIB + 1 :],
        "matrix": torch.randn(600, 400),
        "same": [base, base.view(5, -1)],
    }
    snapshots = Snapshots(pool)
    taken = snapshots.take(state)
    assert taken.equals_source()
    assert taken.for_workers == {"base", "half", "complex", "tail", "matrix"}
    assert (taken.by_trainer, taken.copied.notes, taken.notes) == (800, (), ())
    assert sum(result.nbytes for result in taken.copied.results) == sum(c.nbytes for c in taken.copies) - 800
    assert {result.pid for result in taken.copied.results} <= set(pool.pids)
    base.add_(1)
    state["matrix"].zero_()
    assert not taken.equals_source()
    assert snapshots.take(state, slab=taken.slab).equals_source()


def attached_sources() -> set[int]:
    """In a worker: ids of the sources that it has mapped."""
    return set(shared_source._attached)


# -- what changes between two snapshots -----------------------------------------------------------------------------


def test_replaced_storage_is_copied_from_its_new_place(pool: WorkerPool) -> None:
    snapshots = Snapshots(pool)
    parameter = torch.nn.Parameter(torch.randn(MIB))
    state = {"p": parameter, "t": torch.randn(MIB)}
    before = snapshots.take(state).slab
    parameter.data = torch.randn(2 * MIB)
    state["t"] = torch.randn(MIB)
    again = snapshots.take(state)
    assert again.equals_source() and again.for_workers == {"p", "t"} and again.slab is not before
    assert len(snapshots.sharer.live_sources()) == 2


def test_copy_of_a_storage_that_is_no_longer_where_it_was_is_the_trainers(pool: WorkerPool) -> None:
    """The plan is older than the change: ``split`` looks at each storage once more."""
    snapshots = Snapshots(pool)
    state = {"a": torch.randn(MIB), "b": torch.randn(MIB)}
    taken = snapshots.take(state)
    leaves = [state["a"], torch.randn(MIB)]
    mine, theirs = snapshots.sharer.split(taken.copies, leaves)
    assert [copy.leaf for copy in mine] == [1] and [copy.leaf for copy in theirs] == [0]


def test_dropped_tensor_is_freed_and_its_worker_unmaps_it(lone_pool: WorkerPool) -> None:
    snapshots = Snapshots(lone_pool)
    state = {"kept": torch.randn(MIB), "dropped": torch.randn(MIB)}
    snapshots.take(state)
    assert len(lone_pool.submit(attached_sources).result()) == 2
    memory = StorageWeakRef(state["dropped"].untyped_storage())
    tensor = weakref.ref(state["dropped"])
    del state["dropped"]
    gc.collect()
    assert tensor() is None and memory.expired()
    assert len(snapshots.sharer.live_sources()) == 1  # asking is noticing; so are share() and split()
    (live,) = snapshots.sharer.live_sources()
    assert lone_pool.submit(attached_sources).result() == {live}
    assert shared_mappings_of(lone_pool.pids[0]) == 1
    assert snapshots.take(state).equals_source()


def shared_mappings_of(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/torch_")


# -- what stays the trainer's ---------------------------------------------------------------------------------------


def test_memory_that_cannot_be_moved_is_copied_by_the_trainer_and_noted(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(os.urandom(MIB))
    array = np.random.default_rng(0).random(1 << 17)
    state = {
        "numpy": {"a": torch.from_numpy(array), "b": torch.from_numpy(array + 1)},
        "mapped": torch.from_file(str(tmp_path / "mapped"), shared=True, size=MIB, dtype=torch.uint8),
        "moved": torch.randn(MIB),
    }
    taken = Snapshots(pool).take(state)
    assert taken.equals_source()
    assert taken.for_workers == {"moved"}
    (note,) = taken.notes
    assert note.startswith("3 large tensors copied by the trainer: their storage wraps memory that cannot be moved")
    assert note.endswith("e.g. mapped") or note.endswith("e.g. numpy.a")
    array += 1  # the trainer's copy was of the live array
    assert not taken.equals_source()


def test_descriptors_go_to_the_largest_storages(pool: WorkerPool) -> None:
    state = {f"t{n}": random_bytes(n * MIB) for n in (1, 4, 2, 3)}
    taken = Snapshots(pool, fd_budget=2).take(state)
    assert taken.equals_source() and taken.for_workers == {"t4", "t3"}
    (note,) = taken.notes
    assert note.startswith("2 large tensors copied by the trainer: no more descriptors") and note.endswith("e.g. t2")


def test_descriptor_budget_is_an_eighth_of_the_limit(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 * 17, 8 * 17))
    state = {f"t{n}": random_bytes(MIB) for n in range(20)}
    taken = Snapshots(pool).take(state)
    assert taken.equals_source() and len(taken.for_workers) == 17


def test_what_has_no_room_in_dev_shm_is_copied_by_the_trainer(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movable, "free_shm_bytes", lambda: 2 * MIB)
    state = {"large": random_bytes(3 * MIB), "fits": random_bytes(2 * MIB)}
    taken = Snapshots(pool).take(state)
    assert taken.equals_source() and taken.for_workers == {"fits"}
    assert not state["large"].is_shared()
    (note,) = taken.notes
    assert "/dev/shm has no room" in note and note.endswith("e.g. large")


def test_small_storages_stay_where_they_are(pool: WorkerPool) -> None:
    state = {"small": random_bytes(MIB - 1), "large": random_bytes(MIB)}
    taken = Snapshots(pool, min_bytes=MIB).take(state)
    assert taken.equals_source() and taken.for_workers == {"large"} and taken.notes == ()
    assert not state["small"].is_shared()


def test_auto_moves_nothing_and_lets_workers_copy_what_is_shared_and_guarded(pool: WorkerPool) -> None:
    state = {"shared": torch.randn(MIB).share_memory_(), "private": torch.randn(MIB)}
    addresses = [tensor.data_ptr() for tensor in state.values()]
    snapshots = Snapshots(pool, "auto")
    guarded = snapshots.take(state)
    assert guarded.equals_source() and guarded.for_workers == {"shared"} and guarded.notes == ()
    unguarded = snapshots.take(state, guarded=False)
    assert unguarded.equals_source() and unguarded.for_workers == set()
    assert [tensor.data_ptr() for tensor in state.values()] == addresses
    assert not state["private"].is_shared()


def test_location_trainer_asks_no_worker(pool: WorkerPool) -> None:
    state = {"shared": torch.randn(MIB).share_memory_()}
    taken = Snapshots(pool, "trainer").take(state)
    assert taken.equals_source() and taken.for_workers == set() and taken.notes == ()


def test_busy_workers_are_not_waited_for(lone_pool: WorkerPool, tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    blocked = lone_pool.hand_over(tasks.block_on, fifo)
    state = {"w": random_bytes(MIB)}
    taken = Snapshots(lone_pool).take(state)
    assert taken.equals_source() and taken.by_trainer == MIB
    assert taken.copied.notes == ("1,048,576 bytes in shared memory copied by the trainer: no worker was idle",)
    with open(fifo, "w"):
        pass
    blocked.result()


def test_closed_pool_leaves_the_copy_to_the_trainer() -> None:
    pool = WorkerPool(count=1)
    snapshots, state = Snapshots(pool), {"w": random_bytes(MIB)}
    pool.close()
    taken = snapshots.take(state)
    assert taken.equals_source() and taken.by_trainer == MIB
