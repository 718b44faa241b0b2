"""A signal announces the end: the loop saves once more, and leaves in time."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch

from stager import ArenaFullError, ArgumentError, Checkpointer, UsageError
from stager.saving import ending
from stager.saving.preemption import Preemption
from stager.workers.errors import LeftRunningError
from tests.crash.aftermath import committed_steps, value_of, wait_for_workers_to_end
from tests.crash.nursery import Nursery
from tests.faults import Faults
from tests.waiting import wait_until_blocked

_PREEMPTED = "tests.crash.trainers:preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_last_save_is_committed_before_the_process_ends(
    run_dir: Path, nursery: Nursery, number: signal.Signals
) -> None:
    """To the trainer and its worker, as a job manager does."""
    with nursery.start(_PREEMPTED, str(run_dir), None) as trainer:
        assert trainer.read() == "base"
        trainer.send_to_all(number)
        expected = ["chained"] if number == signal.SIGUSR1 else []
        expected += [f"requested by {number.name}", "closed: NoneType"]
        assert [trainer.read() for _ in expected] == expected
        assert trainer.wait() == 0, trainer.stderr.read_text()
    assert committed_steps(run_dir) == [0, 1]
    wait_for_workers_to_end()


def test_what_is_not_committed_at_the_deadline_is_left_to_the_workers_who_commit_it(
    run_dir: Path, faults: Faults, nursery: Nursery
) -> None:
    """1. the worker is held before it writes; 2. the deadline passes, and the trainer ends with 0; 3. the worker goes on."""
    hold = faults.hold("part.begin", after=1)
    with nursery.start(_PREEMPTED, str(run_dir), 0.2) as trainer:
        assert trainer.read() == "base"
        trainer.send_to_all(signal.SIGTERM)
        hold.wait()
        assert [trainer.read(), trainer.read()] == ["requested by SIGTERM", "closed: LeftRunningError"]
        assert trainer.wait() == 0
        assert not (run_dir / "step-00000001").exists()
        hold.release()
        wait_for_workers_to_end()
        assert "step 1 is staged and not committed yet" in trainer.stderr.read_text()
    assert committed_steps(run_dir) == [0, 1]


def test_what_is_still_copied_at_the_deadline_is_handed_over_and_left_to_the_workers(
    run_dir: Path, faults: Faults
) -> None:
    """1. the copy of a guarded save is held, while the worker has nothing to do; 2. the deadline passes, and close() goes
    on to detach; 3. the copy is done: the workers get it, and commit it."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    ckpt = Checkpointer(run_dir, {"workers": {"count": 1}})
    ckpt.guard(optimizer)
    ckpt.on_preemption([signal.SIGUSR1], deadline_secs=0.2)
    hold = faults.hold("save.copied")
    handle = ckpt.save(1, {"model": model})
    hold.wait()
    os.kill(os.getpid(), signal.SIGUSR1)
    closing = threading.Thread(target=ckpt.close)
    closing.start()
    wait_until_blocked(closing, ending._detach)  # 2.
    hold.release()  # 3.
    closing.join()
    assert isinstance(handle.upload_completion.exception(), LeftRunningError)
    wait_for_workers_to_end()
    assert [info.step for info in Checkpointer(run_dir, read_only=True).checkpoints()] == [1]


def test_save_that_finds_no_buffer_before_the_deadline_is_refused_and_those_before_are_committed(
    run_dir: Path, faults: Faults
) -> None:
    hold = faults.hold("part.begin")
    with Checkpointer(run_dir, {"workers": {"count": 1}, "arena": {"buffers": 2}}) as ckpt:
        preemption = ckpt.on_preemption([], deadline_secs=0.0)
        for step in range(2):
            ckpt.save(step, {"x": torch.full((10,), value_of(step))})
        hold.wait()
        preemption.request()
        with pytest.raises(ArenaFullError, match="this save is not taken"):
            ckpt.save(2, {"x": torch.ones(10)})
        hold.release()
    wait_for_workers_to_end()  # close() had no time left: they finished by themselves
    assert committed_steps(run_dir) == [0, 1]


def test_handlers_are_chained_and_put_back(run_dir: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        mine = signal.getsignal(signal.SIGUSR2)
        with Checkpointer(run_dir) as ckpt:
            preemption = ckpt.on_preemption([signal.SIGUSR2], deadline_secs=1000.0)
            assert (preemption.requested, preemption.signal, preemption.remaining_secs()) == (False, None, None)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert preemption.requested and preemption.signal == signal.SIGUSR2
            first = preemption.remaining_secs()
            os.kill(os.getpid(), signal.SIGUSR2)  # the deadline stays that of the first
            second = preemption.remaining_secs()
            assert first is not None and second is not None and 0 < second <= first <= 1000
            assert seen == [signal.SIGUSR2] * 2
            with pytest.raises(UsageError, match="may be called once only; keep the object"):
                ckpt.on_preemption()
            handle = ckpt.save(0, {"x": torch.ones(10)})
        assert handle.upload_completion.result().step == 0
        assert signal.getsignal(signal.SIGUSR2) == mine
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_handler_that_was_set_later_stays_and_ours_passes_on() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        preemption = Preemption([signal.SIGUSR2], None)
        ours = signal.getsignal(signal.SIGUSR2)
        assert callable(ours)

        def later(number: int, frame: FrameType | None) -> None:  # as a library would
            ours(number, frame)

        signal.signal(signal.SIGUSR2, later)
        preemption.restore()
        assert signal.getsignal(signal.SIGUSR2) is later
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen == [signal.SIGUSR2] and not preemption.requested
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 and later, with threads
def test_forked_child_dies_of_the_signal_as_before() -> None:
    """A DataLoader's worker must end when it is told to."""
    preemption = Preemption([signal.SIGUSR2], None)
    try:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGUSR2
        assert not preemption.requested
    finally:
        preemption.restore()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_other_thread_than_the_main_one_is_refused() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            Preemption([signal.SIGUSR2], None)
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in str(errors[0])
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    with pytest.raises(ValueError, match="deadline_secs"):
        Preemption([signal.SIGUSR2], float("nan"))
    with pytest.raises(ArgumentError, match="SIGKILL, which no process can handle"):
        Preemption([signal.SIGUSR2, signal.SIGKILL], None)
    with pytest.raises(ArgumentError, match="signals has 99, which is not the number of a signal"):
        Preemption([signal.SIGUSR2, 99], None)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_announcement_in_another_way_than_a_signal() -> None:
    preemption = Preemption([], deadline_secs=0.0)
    preemption.request()
    assert (preemption.requested, preemption.signal, preemption.remaining_secs()) == (True, None, 0.0)
