"""``WorkerStager``: what is its own. That its copies are copies, ``test_torch_compat.py``, ``test_tensors.py``,
``test_deepcopy_objects.py`` and ``test_hypothesis.py`` show, which run with it, too."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stager import WorkerStager
from stager.workers.errors import (
    ArgumentError,
    ClosedError,
    MemoryBudgetError,
    StorageError,
    UnstageableError,
    UsageError,
    WorkerDiedError,
)
from tests import scripts
from tests.faults import Faults
from tests.observed import child_pids, shm_names
from tests.staging.child import run
from tests.staging.compare import assert_private_copy

HERE = "tests.staging.test_worker_stager"
MIB = 1 << 20
POINTS = [
    "task.receive",
    "task.run",
    "stage.begin",
    "stage.unpacked",
    "copy.piece",
    "stage.copied",
    "stage.packed",
    "task.reply",
    "persist.begin",
    "persist.written",
    "persist.synced",
    "persist.renamed",
]
SOME_POINTS = ["stage.unpacked", "copy.piece", "persist.written"]


def new_stager(**sections: dict[str, Any]) -> WorkerStager:
    workers = {"count": 2, "nice": 0, **sections.pop("workers", {})}
    return WorkerStager({"workers": workers, "staging": {"copy_threads": 1}, **sections})


@pytest.fixture
def held(faults: Faults) -> Iterator[tuple[WorkerStager, Faults]]:
    """A stager of one worker that points can hold."""
    with new_stager(workers={"count": 1}) as stager:
        stager.stage({}).result()
        yield stager, faults


def state(value: float) -> dict[str, Any]:
    """Large, which workers copy; a view of it; small, and unmovable, which the trainer copies."""
    large = torch.full((MIB,), value)
    wrapped = torch.from_numpy(np.full(MIB, value))
    return {"large": large, "view": large[10:20], "small": torch.full((3,), value), "wrapped": wrapped, "step": value}


def check(staged: dict[str, Any], value: float) -> None:
    assert staged["step"] == value
    for key in ("large", "view", "small", "wrapped"):
        assert bool((staged[key] == value).all()), key
        assert staged[key].is_shared(), key
    staged["large"][10] = value + 1
    assert staged["view"][0] == value + 1
    staged["large"][10] = value


def change(source: dict[str, Any], value: float) -> None:
    for key in ("large", "small", "wrapped"):
        source[key].fill_(value)
    source["step"] = value


class TestFutures:
    def test_comes_before_the_copy_is_made(self, held: tuple[WorkerStager, Faults]) -> None:
        stager, faults = held
        source = state(1)
        with faults.hold("stage.begin") as hold:
            future = stager.stage(source)
            hold.wait()
            assert not future.done()
            assert not future.cancel()
        check(future.result(), 1)

    def test_state_may_be_changed_as_soon_as_it_is_done(self, worker_stager: WorkerStager) -> None:
        source = state(1)
        future = worker_stager.stage(source)
        worker_stager.synchronize_staging()
        change(source, 2)
        check(future.result(), 1)

    def test_state_may_be_dropped_before(self, worker_stager: WorkerStager) -> None:
        future = worker_stager.stage(state(1))
        gc.collect()
        check(future.result(), 1)

    def test_several_are_held_and_read_in_any_order(self, worker_stager: WorkerStager) -> None:
        source = state(0)
        futures = []
        for value in range(5):
            change(source, value)
            futures.append(worker_stager.stage(source))
            worker_stager.synchronize_staging()
        for value in (3, 0, 4, 1, 2):
            check(futures[value].result(), value)

    def test_several_stagings_are_in_flight(self, worker_stager: WorkerStager) -> None:
        sources = [state(value) for value in range(6)]
        for value, future in enumerate([worker_stager.stage(source) for source in sources]):
            check(future.result(), value)

    def test_two_stagers_share_the_same_sources(self, worker_stager: WorkerStager) -> None:
        source = state(7)
        with new_stager() as other:
            one, two = worker_stager.stage(source), other.stage(source)
            check(one.result(), 7)
            check(two.result(), 7)
            assert one.result()["large"].data_ptr() != two.result()["large"].data_ptr()


class TestLeases:
    def test_memory_of_a_dropped_result_is_used_again(self, worker_stager: WorkerStager) -> None:
        source = state(1)
        staged = worker_stager.stage(source).result()
        before = staged["large"].data_ptr()
        kept = staged["view"]
        del staged
        other = worker_stager.stage(source).result()
        assert other["large"].data_ptr() != before  # a view holds it
        del kept
        assert worker_stager.stage(source).result()["large"].data_ptr() == before
        check(other, 1)

    def test_release_ends_a_lease_early(self, worker_stager: WorkerStager) -> None:
        source = state(1)
        staged = worker_stager.stage(source).result()
        assert worker_stager.release(staged) == 1
        assert worker_stager.release(staged) == 0
        assert worker_stager.release({"w": torch.ones(2)}) == 0
        change(source, 2)
        worker_stager.stage(source).result()
        check({**staged, "step": 2}, 2)  # what release() allows

    def test_held_results_fill_the_budget(self) -> None:
        with new_stager(arena={"max_host_bytes": 60 * MIB}) as stager:
            source = state(1)  # 17 MiB
            results = [stager.stage(source).result() for _ in range(3)]
            with pytest.raises(MemoryBudgetError, match=r"arena\.max_host_bytes allows 62,914,560"):
                stager.stage(source)
            results.pop()
            results.append(stager.stage(source).result())
            for result in results:
                check(result, 1)

    def test_results_outlive_close(self) -> None:
        with new_stager() as stager:
            staged = stager.stage(state(3)).result()
        check(staged, 3)

    def test_shapes_that_change_leave_nothing(self, worker_stager: WorkerStager) -> None:
        for step in range(40):
            source = {"w": torch.full((step % 7 + 1, 300_000), float(step)), "list": [torch.ones(step)] * (step % 3)}
            assert_private_copy(source, worker_stager.stage(source).result())
        assert worker_stager._memory._pool.nbytes <= 8 * 9 * MIB

    def test_60_stagings_leave_what_one_leaves(self, worker_stager: WorkerStager) -> None:
        source = state(0)
        seen = set()
        for value in range(60):
            change(source, value)
            staged = worker_stager.stage(source).result()
            assert staged["large"][-1] == value
            if value >= 10:
                seen.add((len(os.listdir("/proc/self/fd")), len(worker_stager._memory._pool)))
        assert len(seen) == 1


def test_what_is_not_a_number_is_copied(worker_stager: WorkerStager) -> None:
    source = {"nan": [float("nan"), -0.0], "tensor": torch.tensor([float("nan")])}
    assert_private_copy(source, worker_stager.stage(source).result())


class TestRefused:
    def test_names_its_key_before_anything_is_moved(self, worker_stager: WorkerStager) -> None:
        source = {"w": torch.ones(MIB), "model": {"layers": [1, {"lock": threading.Lock()}]}}
        address = source["w"].data_ptr()
        with pytest.raises(UnstageableError, match=r"_thread\.lock cannot be copied") as caught:
            worker_stager.stage(source)
        assert caught.value.key_path == "model['layers'][1]['lock']"
        assert (source["w"].data_ptr(), source["w"].is_shared()) == (address, False)

    def test_generator_and_freed_tensor(self, worker_stager: WorkerStager) -> None:
        freed = torch.ones(4)
        freed.untyped_storage().resize_(0)
        for value, what in (((x for x in ()), "generator"), (freed, "freed or resized")):
            with pytest.raises(UnstageableError, match=what) as caught:
                worker_stager.stage({"a": (0, value)})
            assert caught.value.key_path == "a[1]"

    def test_too_deep_a_nest(self, worker_stager: WorkerStager) -> None:
        source: Any = torch.ones(2)
        for _ in range(300):
            source = [source]
        assert_private_copy(source, worker_stager.stage(source).result())
        for _ in range(3000):
            source = [source]
        with pytest.raises((UnstageableError, RecursionError)):
            worker_stager.stage(source)

    def test_closed(self) -> None:
        stager = new_stager(workers={"count": 1})
        stager.close()
        stager.close()
        for call in (lambda: stager.stage({}), stager.guard):
            with pytest.raises(ClosedError, match="after close"):
                call()

    def test_close_in_a_callback(self) -> None:
        with new_stager(workers={"count": 1}) as stager:
            raised: list[BaseException] = []

            def close(_: Any) -> None:
                try:
                    stager.close()
                except UsageError as error:
                    raised.append(error)

            future = stager.stage({"w": torch.ones(2)})
            future.add_done_callback(close)
            future.result()
            stager.synchronize_staging()
        assert "callback" in str(raised[0])

    def test_in_a_forked_child(self, worker_stager: WorkerStager) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                worker_stager.close()
                worker_stager.stage({})
            except ClosedError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        with open(read, "rb") as end:
            said = end.read().decode()
        os.waitpid(pid, 0)
        assert f"belongs to process {os.getpid()}" in said
        check(worker_stager.stage(state(1)).result(), 1)

    def test_under_file_system_sharing(self, worker_stager: WorkerStager) -> None:
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            with pytest.raises(UsageError, match="file_descriptor"):
                worker_stager.stage({})
        finally:
            torch.multiprocessing.set_sharing_strategy("file_descriptor")


class TestGuard:
    def test_step_waits_for_the_copy(self, held: tuple[WorkerStager, Faults]) -> None:
        """1. A worker is held before it copies. 2. A step begins, and waits. 3. The worker goes on. 4. The step is made."""
        stager, faults = held
        parameter = torch.nn.Parameter(torch.ones(MIB))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        parameter.grad = torch.ones(MIB)
        stager.guard(optimizer)
        waiting, stepped = threading.Event(), threading.Event()
        wait = stager._wait_before_step

        def step() -> None:
            optimizer.step()
            stepped.set()

        def tell(*args: Any) -> None:
            waiting.set()
            wait(*args)

        stager._guard._wait = tell
        thread = threading.Thread(target=step)
        with faults.hold("stage.begin") as hold:
            future = stager.stage({"p": parameter})
            hold.wait()
            thread.start()
            waiting.wait()
            assert not stepped.is_set()
        thread.join()
        assert bool((future.result()["p"] == 1).all())
        assert bool((parameter == 0).all())


class TestWorkersThatDie:
    @pytest.mark.parametrize(
        "points", [SOME_POINTS, pytest.param(POINTS, marks=pytest.mark.long)], ids=["some points", "all points"]
    )
    def test_the_copy_is_made_again(self, points: list[str], faults: Faults, tmp_path: Path) -> None:
        source = state(0)
        with new_stager() as stager:
            stager.stage(source).result()
            for value, point in enumerate(points):
                change(source, value)
                faults.arm(point, "kill")
                file = str(tmp_path / f"{value}.pt")
                check(stager.stage(source, persist_to=file).result(), value)
                assert faults.fired(point), point
                assert torch.equal(torch.load(file)["large"], source["large"]), point
                assert os.listdir(tmp_path).count(f"{value}.pt.tmp") == 0, point

    def test_as_often_as_is_allowed_the_future_names_the_last(self, faults: Faults) -> None:
        with new_stager(workers={"count": 1, "max_restarts": 0}) as stager:
            stager.stage({}).result()
            (pid,) = stager._pool.pids
            faults.arm("stage.copied", "kill")
            with pytest.raises(WorkerDiedError, match=f"worker {pid} was killed by SIGKILL") as caught:
                stager.stage(state(1)).result()
            assert caught.value.pid == pid
            with pytest.raises(WorkerDiedError):
                stager.synchronize_staging()
            check(stager.stage(state(2)).result(), 2)

    def test_error_in_a_worker_reaches_the_future(self, held: tuple[WorkerStager, Faults]) -> None:
        stager, faults = held
        faults.arm("copy.piece", "errno ENOMEM")
        with pytest.raises(OSError, match="Cannot allocate memory"):
            stager.stage(state(1)).result()
        check(stager.stage(state(2)).result(), 2)


class TestPersisting:
    def test_writes_what_torch_load_reads(self, worker_stager: WorkerStager, tmp_path: Path) -> None:
        file = tmp_path / "new" / "state.pt"
        source = {**state(1), "parameter": torch.nn.Parameter(torch.ones(2)), "nested": [{"a": torch.arange(3)}]}
        source["alias"] = source["nested"][0]["a"]
        staged = worker_stager.stage(source, persist_to=file).result()
        loaded = torch.load(file)
        for one in (staged, loaded):
            assert_private_copy(source["nested"], one["nested"])
            assert one["alias"] is one["nested"][0]["a"]
            assert isinstance(one["parameter"], torch.nn.Parameter)
            assert torch.equal(one["wrapped"], source["wrapped"])
        assert loaded["view"].untyped_storage().data_ptr() == loaded["large"].untyped_storage().data_ptr()
        assert [path.name for path in file.parent.iterdir()] == ["state.pt"]

    def test_state_may_be_changed_before_it_is_written(self, held: tuple[WorkerStager, Faults], tmp_path: Path) -> None:
        stager, faults = held
        source = state(1)
        with faults.hold("persist.begin") as hold:
            future = stager.stage(source, persist_to=tmp_path / "state.pt")
            hold.wait()
            stager.synchronize_staging()
            change(source, 2)
            assert not future.done()
        check(future.result(), 1)
        loaded = torch.load(tmp_path / "state.pt")
        assert [loaded[key].max() for key in ("large", "small", "wrapped")] == [1, 1, 1]

    def test_failure_leaves_the_last_file(self, held: tuple[WorkerStager, Faults], tmp_path: Path) -> None:
        stager, faults = held
        file = tmp_path / "state.pt"
        stager.stage(state(1), persist_to=file).result()
        faults.arm("persist.written", "errno ENOSPC")
        with pytest.raises(StorageError, match="cannot write the state dict") as caught:
            stager.stage(state(2), persist_to=file).result()
        assert caught.value.path == str(file)
        assert torch.load(file)["step"] == 1
        assert os.listdir(tmp_path).count("state.pt.tmp") == 0

    def test_what_no_file_can_name_is_refused(self, worker_stager: WorkerStager, tmp_path: Path) -> None:
        source = {"w": torch.ones(MIB), "hooks": [len, lambda: 1]}
        with pytest.raises(UnstageableError, match="not be written to a file") as caught:
            worker_stager.stage(source, persist_to=tmp_path / "state.pt")
        assert caught.value.key_path == "hooks[1]"
        assert not source["w"].is_shared()
        assert worker_stager.stage(source).result()["hooks"] == source["hooks"]

    def test_what_is_no_path_is_refused(self, worker_stager: WorkerStager) -> None:
        with pytest.raises(ArgumentError, match="persist_to must be the path of a file, got 3"):
            worker_stager.stage({}, persist_to=3)  # type: ignore[arg-type]  # wrong on purpose


AT_EXIT = """
import sys, torch
from stager import WorkerStager

class Mine:
    def __init__(self, tensor):
        self.tensor = tensor

stager = WorkerStager({"workers": {"count": 1, "nice": 0}})
stager.stage({"mine": Mine(torch.arange(5)), "w": torch.ones(1 << 20)}, persist_to=sys.argv[1])
"""

READ = """
import sys, torch

class Mine: pass

loaded = torch.load(sys.argv[1], weights_only=False)
print(type(loaded["mine"]) is Mine, loaded["mine"].tensor.tolist(), loaded["w"].sum().item())
"""


def test_left_open_at_exit_it_writes_what_was_staged_with_a_class_of_the_main_module(tmp_path: Path) -> None:
    file = str(tmp_path / "state.pt")
    with scripts.running(AT_EXIT, file) as program:
        assert program.wait() == 0
    with scripts.running(READ, file) as program:
        assert program.stdout.read() == "True [0, 1, 2, 3, 4] 1048576.0\n"
        assert program.wait() == 0


def many_tensors(count: int) -> dict[str, Any]:
    """Runs in a child with 1,024 descriptors."""
    source: dict[str, Any] = {str(index): torch.full((256,), float(index)) for index in range(count)}
    source.update((f"large-{index}", torch.full((MIB // 4,), float(index))) for index in range(200))
    with WorkerStager() as stager:
        before = len(os.listdir("/proc/self/fd"))
        staged = stager.stage(source).result()
        fds = len(os.listdir("/proc/self/fd")) - before
        equal = all(torch.equal(tensor, source[key]) for key, tensor in staged.items())
        is_shared = all(tensor.is_shared() for tensor in staged.values())
        again = stager.stage(source).result()["7"].tolist() == source["7"].tolist()
        workers = child_pids()
    return {
        "equal": equal,
        "shared": is_shared,
        "again": again,
        "fds": fds,
        "shm": shm_names(os.getpid(), *workers),
    }


def test_20000_tensors_under_1024_descriptors() -> None:
    result = run(f"{HERE}:many_tensors", 20_000, nofile=1024)
    assert result.pop("fds") <= 128 + 8  # an eighth of the limit for the user's tensors, and the result's
    assert result == {"equal": True, "shared": True, "again": True, "shm": []}
