"""A job is heard until the last of its ranks is dead, is killed as a whole or in part, and its workers are found."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stager.demo import job as job_module
from stager.demo.events import RankEvent, Resumed, StepDone
from stager.demo.job import Job, JobError, job_environment
from tests import forked_subprocess

MODULE = "tests.demo.talkative"  # each rank says two steps, then does as it is told

StartJob = Callable[..., Job]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def start(log: Path, monkeypatch: pytest.MonkeyPatch) -> StartJob:
    """Start one rank with these arguments, or two with torchrun."""
    monkeypatch.setattr(job_module, "subprocess", forked_subprocess)

    def job(*arguments: str, num_ranks: int = 1) -> Job:
        return Job(MODULE, arguments, log, num_ranks, torchrun=num_ranks > 1)

    return job


def steps_of(num_ranks: int) -> set[RankEvent]:
    steps = (StepDone(1, 0.5, 0.0), StepDone(2, 0.25, 0.0))
    return {RankEvent(rank, step) for rank in range(num_ranks) for step in steps}


def hear_steps(job: Job, num_ranks: int) -> set[RankEvent]:
    """What the ranks say before they wait."""
    said = job.events()
    return {next(said) for _ in range(2 * num_ranks)}


def processes_of(job: Job, num_ranks: int) -> list[psutil.Process]:
    """The ranks, and their torchrun."""
    root = psutil.Process(job.pid)
    return [root, *root.children()] if num_ranks > 1 else [root]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_job_that_ends_well_is_heard_to_the_end(start: StartJob, num_ranks: int) -> None:
    with start("exit", "0", "0", num_ranks=num_ranks) as job:
        assert set(job.events()) == steps_of(num_ranks)
        job.wait()


def test_job_that_fails_is_an_error_with_the_end_of_its_log(start: StartJob) -> None:
    with start("exit", "3") as job:
        assert set(job.events()) == steps_of(1)
        with pytest.raises(JobError, match=r"(?s)exit code 3.*this is the last line of rank 0"):
            job.wait()


def test_job_of_which_one_rank_fails_is_an_error(start: StartJob, log: Path) -> None:
    with start("exit", "0", "3", num_ranks=2) as job:
        heard = set(job.events())
        failed = {event for event in steps_of(2) if event.rank == 1}
        assert failed <= heard <= steps_of(2)  # torchrun may end rank 0 before it has said a word
        with pytest.raises(JobError, match="exit code 1"):
            job.wait()
    assert "this is the last line of rank 1" in log.read_text()


def test_events_end_with_the_rank_although_its_worker_lives_on(start: StartJob) -> None:
    with start("leave a worker") as job:
        events = job.events()
        assert next(events) == RankEvent(0, StepDone(1, 0.5, 0.0))
        for said in events:
            if isinstance(said.event, Resumed):  # names the worker's pid, in lack of an event for it
                worker = psutil.Process(said.event.step)
                job.kill()
        assert [process.pid for process in job.workers_alive()] == [worker.pid]

        secs, left = job.wait_until_gone(timeout_secs=0.0)
        assert left == [worker.pid]

        worker.send_signal(signal.SIGKILL)
        secs, left = job.wait_until_gone(timeout_secs=60.0)
        assert left == []
        assert secs < 60.0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_whole_job_is_killed_and_its_end_is_heard(start: StartJob, num_ranks: int) -> None:
    with start("wait", num_ranks=num_ranks) as job:
        assert hear_steps(job, num_ranks) == steps_of(num_ranks)
        processes = processes_of(job, num_ranks)
        assert len(processes) == (3 if num_ranks > 1 else 1)
        assert job.workers_alive() == []
        job.kill()
        assert list(job.events()) == []
        assert job.exit_code() == -9
    assert psutil.wait_procs(processes, timeout=60)[1] == []


@pytest.mark.parametrize(("num_ranks", "exit_code"), [(1, -9), (2, 1)])
def test_job_of_which_the_last_rank_is_killed_ends_with_an_error(
    start: StartJob, num_ranks: int, exit_code: int
) -> None:
    with start("wait", num_ranks=num_ranks) as job:
        assert hear_steps(job, num_ranks) == steps_of(num_ranks)
        processes = processes_of(job, num_ranks)
        job.kill_rank(num_ranks - 1)
        assert list(job.events()) == []
        assert job.exit_code() == exit_code
        assert psutil.wait_procs(processes, timeout=60)[1] == []


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_error_in_the_parent_kills_the_job(start: StartJob, num_ranks: int) -> None:
    processes: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt):
        with start("wait", num_ranks=num_ranks) as job:
            next(job.events())  # another rank may not have said a word yet
            processes += processes_of(job, num_ranks)
            raise KeyboardInterrupt
    assert len(processes) == (3 if num_ranks > 1 else 1)
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_silent_job_is_given_up(start: StartJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stager.demo.job.SILENCE_SECS", 0.0)
    with start("wait") as job:
        with pytest.raises(JobError, match="said nothing"):
            list(job.events())


def test_job_does_not_take_itself_for_the_one_that_started_it() -> None:
    outer = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "7", "ROLE_NAME": "default"}
    outer |= {"TORCHELASTIC_ERROR_FILE": "/x", "PET_NNODES": "2", "HOME": "/home", "RANKING": "mine"}
    inner = job_environment(outer)
    assert inner["HOME"] == "/home"
    assert set(inner) <= {"HOME", "RANKING", "PYTHONPATH"}
