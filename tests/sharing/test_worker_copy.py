"""Workers die while they copy, refuse, or are asked for what is not there; the snapshot is whole or the save fails."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from stager.sharing import worker_copy
from stager.workers import PoolOptions, WorkerPool
from stager.workers.errors import InternalError
from stager.workers.memory.shared_source import SharedSource, Stretch, copy_shared
from stager.workers.memory.slab import Slab
from tests.faults import Faults
from tests.sharing.snapshots import MIB, Snapshots, Taken, random_bytes


def started(count: int, **options: int) -> WorkerPool:
    pool = WorkerPool(count=count, options=PoolOptions(**options))
    wait_idle(pool)
    return pool


def wait_idle(pool: WorkerPool) -> None:
    """All of its workers have started: so many tasks are dealt to every one of them."""
    count = pool._supervisor._count
    while len({future.result() for future in [pool.hand_over(os.getpid) for _ in range(3 * count)]}) < count:
        pass


class InThread:
    """A snapshot that is taken while the test looks on."""

    def __init__(self, snapshots: Snapshots, state: dict[str, torch.Tensor]) -> None:
        self.taken: Taken | None = None

        def take() -> None:
            self.taken = snapshots.take(state)

        self._thread = threading.Thread(target=take)
        self._thread.start()

    def result(self) -> Taken:
        self._thread.join()
        assert self.taken is not None
        return self.taken


def test_worker_killed_at_any_point_of_a_copy_is_replaced_and_the_copy_done_again(faults: Faults) -> None:
    state = {"a": random_bytes(33 * MIB), "b": random_bytes(3 * MIB)}
    with started(2) as pool:
        snapshots = Snapshots(pool)
        for point, action in [("copy.begin", "kill"), ("copy.piece", "segv after=1"), ("copy.done", "exit")]:
            wait_idle(pool)
            for tensor in state.values():
                tensor.add_(1)
            faults.arm(point, action)
            taken = snapshots.take(state)
            assert faults.fired(point), point
            assert taken.equals_source(), point
            assert taken.by_trainer == 0 and len(taken.copied.results) == 2 and taken.copied.notes == ()


def test_two_workers_copy_at_once(faults: Faults) -> None:
    """One is held in the middle of its task until the other has done its own."""
    state = {"w": random_bytes(40 * MIB)}
    hold, other = faults.hold("copy.piece"), faults.hold("copy.done")
    with started(2) as pool:
        snapshot = InThread(Snapshots(pool), state)
        hold.wait()
        other.wait()
        other.release()
        hold.release()
        taken = snapshot.result()
    assert taken.equals_source()
    assert len({result.pid for result in taken.copied.results}) == 2


def test_trainer_copies_what_workers_could_not_after_all_tries(faults: Faults) -> None:
    state = {"w": random_bytes(20 * MIB)}
    with started(1, max_restarts=0) as pool:
        faults.arm("copy.piece", "kill after=1")
        taken = Snapshots(pool).take(state)
        assert taken.equals_source() and taken.by_trainer == 20 * MIB and taken.copied.results == ()
        (note,) = taken.copied.notes
        assert note.startswith("20,971,520 bytes in shared memory copied by the trainer: WorkerDiedError")
        assert "SIGKILL" in note

        wait_idle(pool)
        faults.arm("copy.begin", "errno ENOMEM")
        taken = Snapshots(pool).take(state)
        assert taken.equals_source() and taken.by_trainer == 20 * MIB
        assert "Cannot allocate memory" in taken.copied.notes[0]


def test_error_that_is_nobodys_absence_is_raised_when_the_other_worker_is_done(faults: Faults) -> None:
    """1. One worker is held in its task. 2. The other's raises. 3. ``copy`` still waits. 4. The first goes on."""
    hold = faults.hold("copy.piece")
    errors: list[BaseException] = []
    with started(2) as pool:
        snapshots, state, slab = Snapshots(pool), {"w": random_bytes(2 * MIB)}, Slab.create(3 * MIB)

        def take() -> None:
            try:
                snapshots.take(state, slab=slab)
            except RuntimeError as error:
                errors.append(error)

        faults.arm("copy.done", "raise")
        thread = threading.Thread(target=take)
        thread.start()
        hold.wait()
        try:
            while not faults.fired("copy.done"):
                assert thread.is_alive(), errors
                os.sched_yield()
            assert thread.is_alive() and not errors
        finally:
            hold.release()  # or the pool would wait for it
        thread.join()
    assert "raised by a test" in str(errors[0])
    assert bytes(state["w"].numpy()) in bytes(slab.view)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Raises KeyboardInterrupt, also where a shell has started the tests in the background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_raised_when_no_worker_writes_any_more(faults: Faults) -> None:
    hold, slab = faults.hold("copy.piece"), Slab.create(2 * MIB)
    interrupted = threading.Event()

    def interrupt() -> None:
        hold.wait()
        signal.raise_signal(signal.SIGINT)
        interrupted.set()
        hold.release()

    with started(1) as pool:
        state = {"w": random_bytes(MIB)}
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            Snapshots(pool).take(state, slab=slab)
        assert interrupted.is_set()
        assert bytes(state["w"].numpy()) in bytes(slab.view)
        thread.join()


def test_ctrl_c_between_two_lines_of_a_submission(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is with a worker, and nobody has its Future yet."""
    hold, slab = faults.hold("copy.piece"), Slab.create(2 * MIB)
    waited_for: list[Any] = []

    def let_go_and_wait(futures: list[Any]) -> Any:
        waited_for.extend(futures)
        hold.release()
        return concurrent.futures.wait(futures)

    with started(1) as pool:
        state, submit_to = {"w": random_bytes(MIB)}, pool.submit_to

        def interrupted(*args: Any) -> None:
            submit_to(*args)
            hold.wait()
            raise KeyboardInterrupt

        monkeypatch.setattr(pool, "submit_to", interrupted)
        monkeypatch.setattr(worker_copy, "wait", let_go_and_wait)
        try:
            with pytest.raises(KeyboardInterrupt):
                Snapshots(pool).take(state, slab=slab)
            assert len(waited_for) == 1
            assert bytes(state["w"].numpy()) in bytes(slab.view)
        finally:
            if not waited_for:
                hold.release()  # or the pool would wait for it


# -- what is asked of a worker --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stretch",
    [
        Stretch(0, 1, 0, MIB),
        Stretch(0, -1, 0, 8),
        Stretch(0, MIB, 0, 1),
        Stretch(0, 0, 2 * MIB - 7, 8),
        Stretch(0, 0, -8, 8),
        Stretch(0, 0, 0, -1),
        Stretch(1, 0, 0, 8),
        Stretch(-1, 0, 0, 8),
    ],
)
def test_bad_stretch_is_refused_before_anything_is_written(pool: WorkerPool, stretch: Stretch) -> None:
    storage = torch.ones(MIB, dtype=torch.uint8).share_memory_().untyped_storage()
    slab, source = Slab.create(2 * MIB), SharedSource.of(1 << 60, storage)
    with pytest.raises(InternalError, match="not inside"):
        pool.submit(copy_shared, slab, [source], [Stretch(0, 0, 0, MIB), stretch], frozenset({1 << 60})).result()
    assert bytes(slab.view) == bytes(2 * MIB)


def test_worker_cannot_write_to_a_source(pool: WorkerPool) -> None:
    storage = torch.ones(MIB, dtype=torch.uint8).share_memory_().untyped_storage()

    def mapping(source: SharedSource) -> str:
        with open("/proc/self/maps") as maps:
            return next(line.split()[1] for line in maps if line.startswith(f"{source.address:x}-"))

    assert pool.submit(mapping, SharedSource.of(1 << 61, storage)).result() == "r--s"


def test_storage_that_moved_after_it_was_located_is_not_sent() -> None:
    storage = torch.ones(MIB, dtype=torch.uint8).untyped_storage()
    source = SharedSource.of(1, storage)
    storage._share_fd_cpu_()
    with pytest.raises(InternalError, match="was moved after it was shared"):
        source.__reduce__()


@pytest.mark.parametrize(("sizes", "num_workers"), [([5], 2), ([4096], 2), ([1 << 20] * 7, 2), ([10**7, 3, 10**6], 3)])
def test_tasks_cover_every_byte_once_in_tasks_of_one_size(
    sizes: Sequence[int], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_copy, "_TASK_BYTES", 1 << 20)
    storage = torch.zeros(sum(sizes), dtype=torch.uint8).untyped_storage()
    source = SharedSource.of(1, storage)
    shared, position = [], 0
    for nbytes in sizes:
        copy = worker_copy.Copy(0, source.address + position, position, nbytes, (0,), True)
        shared.append(worker_copy.SharedCopy(copy, source))
        position += nbytes
    covered: list[int] = []
    totals: list[int] = []
    for task in worker_copy.divide(shared, num_workers):
        stretches = task.stretches
        assert all(start == slab_offset and number == 0 for number, start, slab_offset, _ in stretches)
        covered += [byte for _, start, _, nbytes in stretches for byte in (start, start + nbytes)]
        totals.append(sum(stretch.nbytes for stretch in stretches))
    assert covered[0] == 0 and covered[-1] == position and covered[1:-1:2] == covered[2:-1:2]
    assert max(totals) <= 1 << 20 and len(set(totals[:-1])) <= 1 and totals[-1] <= totals[0]
