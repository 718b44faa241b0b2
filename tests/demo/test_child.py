"""A child is heard until its death, and what it leaves behind is found."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from stager.demo.child import Child, ChildError, wait_until_gone
from stager.demo.events import Resumed, StepDone

MODULE = "tests.demo.talkative"  # sends two steps, then does as it is told


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_child_that_ends_well_is_heard_to_the_end(log: Path) -> None:
    with Child(MODULE, ["exit", "0"], log) as child:
        assert list(child.events()) == [StepDone(1, 0.5, 0.0), StepDone(2, 0.25, 0.0)]
        child.wait()


def test_child_that_fails_is_an_error_with_the_end_of_its_log(log: Path) -> None:
    with Child(MODULE, ["exit", "3"], log) as child:
        assert len(list(child.events())) == 2
        with pytest.raises(ChildError, match=r"(?s)exit code 3.*this is the last line"):
            child.wait()


def test_events_end_with_the_child_although_its_worker_lives_on(log: Path) -> None:
    with Child(MODULE, ["leave a worker"], log) as child:
        events = child.events()
        assert next(events) == StepDone(1, 0.5, 0.0)
        for event in events:
            if isinstance(event, Resumed):  # names the worker's pid, in lack of an event for it
                worker = psutil.Process(event.step)
                child.kill()
        assert [process.pid for process in child.workers_alive()] == [worker.pid]

        secs, left = wait_until_gone(child, timeout_secs=0.0)
        assert left == [worker.pid]

        worker.send_signal(signal.SIGKILL)
        secs, left = wait_until_gone(child, timeout_secs=60.0)
        assert left == []
        assert secs < 60.0


def test_error_in_the_parent_kills_the_child(log: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with Child(MODULE, ["wait"], log) as child:
            process = psutil.Process(child.pid)
            next(child.events())
            raise KeyboardInterrupt
    assert not process.is_running()


def test_silent_child_is_given_up(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stager.demo.child.SILENCE_SECS", 0.0)
    with Child(MODULE, ["wait"], log) as child:
        with pytest.raises(ChildError, match="said nothing"):
            list(child.events())
