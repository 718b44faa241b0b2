"""What a call may be, what comes back, and how each kind of mistake is told. None of this harms a worker."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from stager.workers import RemoteTraceback, WorkerError, WorkerPool
from stager.workers.errors import ArgumentError, UsageError
from stager.workers.pool.handle import WorkerState
from tests.pool import tasks


def test_function_method_lambda_and_closure(pool: WorkerPool) -> None:
    captured = {"a": [1, 2]}
    assert pool.submit(divmod, 7, 2).result() == (3, 1)
    assert pool.submit("abc".upper).result() == "ABC"
    assert pool.submit(lambda x, *, y: (x, y, captured), 1, y=2).result() == (1, 2, {"a": [1, 2]})
    assert pool.submit(os.getpid).result() in pool.pids


def test_workers_run_at_the_same_time(pool: WorkerPool, tmp_path: Path) -> None:
    with tasks.blocked_worker(pool, tmp_path) as first, tasks.blocked_worker(pool, tmp_path) as second:
        assert sorted(worker.tasks for worker in pool.health()) == [("block_on",), ("block_on",)]
    assert {first.result(), second.result()} == set(pool.pids)


def test_exception_comes_with_the_remote_traceback_as_its_cause(pool: WorkerPool) -> None:
    with pytest.raises(KeyError, match="of a task") as caught:
        pool.submit(tasks.raises, "of a task").result()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in raises" in str(caught.value.__cause__) and "tasks.py" in str(caught.value.__cause__)


def test_system_exit_of_a_task_is_an_answer(pool: WorkerPool) -> None:
    with pytest.raises(SystemExit):
        pool.submit(lambda: (_ for _ in ()).throw(SystemExit(5))).result()


def test_unpicklable_argument_raises_at_submit_and_leaks_no_descriptor(pool: WorkerPool) -> None:
    shared = torch.ones(10)
    for call in (pool.submit, pool.hand_over):
        with pytest.raises(
            ArgumentError, match=r"identity .*: argument 1 \(list\) cannot be pickled: cannot pickle"
        ) as caught:
            call(tasks.identity, [shared, threading.Lock()])
        assert isinstance(caught.value.__cause__, TypeError)


def test_refused_call_names_the_argument_or_the_function(pool: WorkerPool) -> None:
    lock = threading.Lock()
    with pytest.raises(ArgumentError, match=r"argument other \(lock\) cannot be pickled"):
        pool.submit(dict, first=1, other=lock)
    with pytest.raises(
        ArgumentError, match=r"<lambda> cannot be sent to a worker: the function, or a value that it uses,"
    ):
        pool.submit(lambda: lock)


@pytest.mark.parametrize("value", ["train", 3, None])
def test_what_is_no_function_is_refused_at_submit(value: Any, pool: WorkerPool) -> None:
    for call, name in ((pool.submit, "submit"), (pool.hand_over, "hand_over")):
        with pytest.raises(
            ArgumentError, match=rf"^{name}\(\) takes a function, .*; got {value!r} \({type(value).__name__}"
        ):
            call(value)


def test_unpicklable_result(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"the result of returns_unpicklable \(\w+\) cannot be sent back") as caught:
        pool.submit(tasks.returns_unpicklable).result()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "TypeError: cannot pickle" in str(caught.value.__cause__)


class _FailsToLoad:
    """Only in the process that did not make it."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["pid"] != os.getpid():
            raise self.error()

    @staticmethod
    def error() -> BaseException:
        return ValueError("made elsewhere")


class _ExitsWhenLoaded(_FailsToLoad):
    @staticmethod
    def error() -> BaseException:
        return SystemExit(1)


@pytest.mark.parametrize("kind", [_FailsToLoad, _ExitsWhenLoaded])
def test_result_that_fails_to_unpickle(pool: WorkerPool, kind: type[_FailsToLoad]) -> None:
    with pytest.raises(WorkerError, match="cannot be unpickled") as caught:
        pool.submit(kind).result()
    assert isinstance(caught.value.__cause__, type(kind.error()))
    assert pool.submit(os.getpid).result() in pool.pids


class _Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()


class _MissesAnArgument(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class _LoadsInTheWorkerOnly(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return _only_in, (os.getpid(),)


def _only_in(pid: int) -> Exception:
    if pid != os.getpid():
        raise ValueError("another process")
    return _LoadsInTheWorkerOnly()


class _LoadsAsSomethingElse(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("no exception",)


class _CannotEvenBePrinted(_Unpicklable):
    def __str__(self) -> NoReturn:
        raise ValueError("no")


def _raise(kind: type[Exception], *args: int) -> NoReturn:
    raise kind(*args)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        (_Unpicklable, (), "raised _Unpicklable: has a lock"),
        (_MissesAnArgument, (1, 2), "raised _MissesAnArgument: 1 and 2"),
        (_LoadsInTheWorkerOnly, (), "cannot be unpickled here"),
        (_LoadsAsSomethingElse, (), "raised _LoadsAsSomethingElse"),
        (_CannotEvenBePrinted, (), "raised _CannotEvenBePrinted: <no message>"),
    ],
)
def test_exception_that_cannot_travel_is_described(
    pool: WorkerPool, kind: type[Exception], args: tuple[int, ...], message: str
) -> None:
    with pytest.raises(WorkerError, match=message) as caught:
        pool.submit(_raise, kind, *args).result()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert kind.__name__ in str(caught.value.__cause__)


# -- memory ---------------------------------------------------------------------------------------------------------


def _double_in_place(tensor: torch.Tensor) -> torch.Tensor:
    tensor.mul_(2)
    return tensor


def test_tensors_share_their_memory_both_ways(pool: WorkerPool) -> None:
    source = torch.arange(1000)
    result = pool.submit(_double_in_place, source).result()
    assert source[-1] == 1998
    source[0] = 7
    assert result[0] == 7


def test_more_storages_than_one_ancillary_message_takes(pool: WorkerPool) -> None:
    sources = [torch.full((3,), float(i)) for i in range(600)]
    results = pool.submit(lambda tensors: [t + 1 for t in tensors], sources).result()
    assert [int(t[0]) for t in results] == list(range(1, 601))


def test_huge_messages_cross_each_other(pool: WorkerPool) -> None:
    """Neither side may wait for the other to read before it reads itself."""
    payload = os.urandom(1 << 20) * 50
    futures = [pool.submit(tasks.identity, payload) for _ in range(2)]
    futures += [pool.hand_over(tasks.identity, payload) for _ in range(2)]
    assert all(future.result() == payload for future in futures)


def test_result_is_freed_when_the_caller_lets_go_of_it(pool: WorkerPool) -> None:
    """The pool must not hold the last reply until the next one comes."""
    future = pool.submit(torch.ones, 5)
    result = weakref.ref(future.result())
    assert pool.drain()
    del future
    gc.collect()
    assert result() is None


class _DropsFlag:
    """In a worker: writes to the FIFO when it is freed."""

    def __init__(self, fifo: str) -> None:
        self.fifo = fifo

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__ = state
        weakref.finalize(self, lambda: open(state["fifo"], "w").close())


def test_argument_is_freed_in_the_worker_before_it_waits_for_the_next_task(pool: WorkerPool, tmp_path: Path) -> None:
    fifo = tmp_path / "freed"
    os.mkfifo(fifo)
    future = pool.submit(lambda _: None, _DropsFlag(str(fifo)))
    with open(fifo):  # returns when it was freed
        pass
    future.result()


# -- Futures --------------------------------------------------------------------------------------------------------


def test_many_threads_submit_at_once(pool: WorkerPool) -> None:
    results: dict[int, list[int]] = {}
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        calls = [pool.hand_over if i % 5 == 0 else pool.submit for i in range(50)]
        futures = [call(tasks.identity, number * 1000 + i) for i, call in enumerate(calls)]
        results[number] = [future.result() for future in futures]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [number * 1000 + i for i in range(50)] for number in range(8)}


def test_cancelled_task_does_not_run_and_a_running_one_cannot_be_cancelled(pool: WorkerPool, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with tasks.blocked_worker(pool, tmp_path) as one, tasks.blocked_worker(pool, tmp_path) as two:
        waiting = [pool.submit(tasks.append_line, log, str(i)) for i in range(3)]
        assert waiting[1].cancel()
        assert not one.cancel() and not two.cancel()
        handed_over = pool.hand_over(os.getpid)
        assert not handed_over.cancel()
    assert not wait_for([*waiting, handed_over]).not_done
    assert pool.drain()
    assert sorted(Path(log).read_text().split()) == ["0", "2"]


def test_callback_may_submit_and_hand_over(pool: WorkerPool) -> None:
    inner: list[Future[int]] = []
    done = threading.Event()

    def callback(_: Future[int]) -> None:
        inner.extend((pool.submit(tasks.identity, 1), pool.hand_over(tasks.identity, 2)))
        done.set()

    pool.submit(tasks.identity, 0).add_done_callback(callback)
    done.wait()
    assert [future.result() for future in inner] == [1, 2]


def test_callback_that_would_wait_for_itself_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    errors: list[Exception] = []
    done = threading.Event()

    def callback(_: Future[Any]) -> None:
        for call in (pool.close, pool.drain):
            try:
                call()
            except UsageError as error:
                errors.append(error)
        done.set()

    with tasks.blocked_worker(pool, tmp_path) as future:
        future.add_done_callback(callback)
    done.wait()
    assert len(errors) == 2 and "from another thread" in str(errors[0])
    assert pool.submit(tasks.identity, 1).result() == 1  # and it is not half closed


def test_callback_that_raises_system_exit_ends_nothing(
    pool: WorkerPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(_: Future[Any]) -> None:
        raise SystemExit(1)

    with tasks.blocked_worker(pool, tmp_path) as future:
        future.add_done_callback(callback)
    assert pool.drain()
    assert "a callback of a Future raised" in caplog.text
    assert pool.submit(tasks.identity, 1).result() == 1


# -- the process a task runs in -------------------------------------------------------------------------------------


def test_output_of_a_task_is_not_in_the_channel_nor_on_stdout(
    pool: WorkerPool, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy() -> int:
        os.write(1, b"noise on stdout\n" * 10_000)
        print("noise" * 10_000, flush=True)
        os.system("echo noise of a child")
        return 5

    assert pool.submit(noisy).result() == 5
    assert capfd.readouterr().out == ""


def test_signals_that_job_managers_send_do_not_end_a_worker(pool: WorkerPool, tmp_path: Path) -> None:
    """They are sent to every process of the job; what was staged must still be written."""
    with tasks.blocked_worker(pool, tmp_path) as future:
        pid = tasks.running_pid(pool)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    assert future.result() == pid
    assert pid in pool.pids


def test_what_a_task_starts_heeds_sigterm_and_inherits_no_descriptor(pool: WorkerPool) -> None:
    def start() -> tuple[int, int, list[str]]:
        import subprocess

        forked = os.fork()
        if forked == 0:
            signal.pause()
        os.kill(forked, signal.SIGTERM)
        started = subprocess.Popen(["sleep", "1000"])
        started.terminate()
        fds = subprocess.check_output(["ls", "/proc/self/fd"], close_fds=False, text=True).split()
        return os.waitpid(forked, 0)[1], started.wait(), fds

    forked, started, fds = pool.submit(start).result()
    assert (forked, started) == (signal.SIGTERM, -signal.SIGTERM)
    assert fds == ["0", "1", "2", "3"]  # 3 is the listing's own


def test_health_names_pid_state_and_tasks(pool: WorkerPool, tmp_path: Path) -> None:
    with tasks.blocked_worker(pool, tmp_path), tasks.blocked_worker(pool, tmp_path):
        assert {worker.state for worker in pool.health()} == {WorkerState.READY}
        queued = pool.hand_over(tasks.identity, 1)
        assert sorted(len(worker.tasks) for worker in pool.health()) == [1, 2]
        assert not pool.drain(timeout=0)
    assert queued.result() == 1
    assert pool.drain()
    assert [worker.tasks for worker in pool.health()] == [(), ()]


def test_deadline_that_passed_while_the_reply_was_waiting_to_be_read_kills_nobody(
    pool: WorkerPool, tmp_path: Path
) -> None:
    """1. a callback keeps the supervisor busy; 2. another task ends and replies; 3. its deadline passes; 4. the supervisor
    goes on, and must read before it judges."""
    pids = pool.pids
    in_callback, leave = threading.Event(), threading.Event()
    with tasks.blocked_worker(pool, tmp_path) as late:
        with tasks.blocked_worker(pool, tmp_path) as trigger:
            trigger.add_done_callback(lambda _: (in_callback.set(), leave.wait()))
        in_callback.wait()
        (worker,) = [worker for worker in pool._roster.workers if worker.items]
        worker.items[next(iter(worker.items))].timeout_secs = 0.0
    while not worker.process.has_input():
        os.sched_yield()
    leave.set()
    assert late.result() == worker.pid
    assert pool.pids == pids


def test_pickled_pool_is_refused(pool: WorkerPool) -> None:
    with pytest.raises((TypeError, pickle.PicklingError)):
        pool.submit(tasks.identity, pool)
