"""A job is heard until the last of its processes is gone, and killed as a whole or in part."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stager.demo.child import ChildError
from stager.demo.events import StepDone
from stager.demo.ranks.events import RankEvent
from stager.demo.ranks.job import Job, job_environment

MODULE = "tests.demo.ranks.talkative"  # each rank says one step, then does as it is told
SAID = {RankEvent(rank, StepDone(1, 0.5, 0.0)) for rank in range(2)}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def hear_all(job: Job) -> set[RankEvent]:
    """What the two ranks say before they wait."""
    said = job.rank_events()
    return {next(said), next(said)}


def ranks_of(job: Job) -> list[psutil.Process]:
    return psutil.Process(job.pid).children()


def test_job_that_ends_well_is_heard_to_the_end(log: Path) -> None:
    with Job(2, MODULE, ["exit", "0", "0"], log) as job:
        assert set(job.rank_events()) == SAID
        job.wait()


def test_job_of_which_a_rank_fails_is_an_error_with_the_end_of_its_log(log: Path) -> None:
    with Job(2, MODULE, ["exit", "0", "3"], log) as job:
        assert set(job.rank_events()) == SAID
        with pytest.raises(ChildError, match="exit code 1"):
            job.wait()
    assert "this is the last line of rank 1" in log.read_text()


def test_whole_job_is_killed_and_its_end_is_heard(log: Path) -> None:
    with Job(2, MODULE, ["wait"], log) as job:
        assert hear_all(job) == SAID
        processes = [psutil.Process(job.pid), *ranks_of(job)]
        assert len(processes) == 3
        assert job.workers_alive() == []
        job.kill()
        assert list(job.rank_events()) == []
        assert job.exit_code() == -9
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_job_of_which_one_rank_is_killed_is_ended_by_torchrun(log: Path) -> None:
    with Job(2, MODULE, ["wait"], log) as job:
        assert hear_all(job) == SAID
        processes = ranks_of(job)
        job.kill_rank(1)
        assert list(job.rank_events()) == []
        assert job.exit_code() == 1
        assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_error_in_the_parent_kills_the_job(log: Path) -> None:
    processes: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt):
        with Job(2, MODULE, ["wait"], log) as job:
            next(job.rank_events())  # the other rank may not have said a word yet
            processes += [psutil.Process(job.pid), *ranks_of(job)]
            raise KeyboardInterrupt
    assert len(processes) == 3
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_job_does_not_take_itself_for_the_one_that_started_it() -> None:
    outer = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": "/x", "PET_NNODES": "2", "HOME": "/home"}
    inner = job_environment(outer)
    assert inner["HOME"] == "/home"
    assert set(inner) <= {"HOME", "PYTHONPATH"}
