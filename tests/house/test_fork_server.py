"""What starts the processes of other tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests import fork_server
from tests.pool import tasks

_HERE = "tests.house.test_fork_server"


def say_who_i_am(word: str) -> None:
    print(word, os.environ["WORD"], os.getsid(0) == os.getpid(), file=sys.stdout)
    sys.exit(5)


def stay() -> None:
    if os.fork() == 0:
        signal.pause()
    print("up", flush=True)
    signal.pause()


def test_a_process_has_the_environment_of_the_moment_and_a_session_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fork_server.shared()
    for word in ("one", "two"):
        monkeypatch.setenv("WORD", word)
        pid = server.start(f"{_HERE}:say_who_i_am", ["word"], stdout=tmp_path / word, stderr=tmp_path / "err")
        assert server.wait(pid) == 5
        assert (tmp_path / word).read_text() == f"word {word} True\n"
    assert (tmp_path / "err").read_text() == ""


def test_a_process_that_does_not_end_is_killed_with_what_it_started(tmp_path: Path) -> None:
    server = fork_server.shared()
    os.mkfifo(tmp_path / "out")
    pid = server.start(f"{_HERE}:stay", stdout=tmp_path / "out", stderr=tmp_path / "err")
    with open(tmp_path / "out") as stdout:
        assert stdout.readline() == "up\n"
        children = psutil.Process(pid).children()
        assert len(children) == 2  # the one that it started, and the server of its pools' workers
        with pytest.raises(TimeoutError, match=f"process {pid} did not end within 0 s"):
            server.wait(pid, 0)
        server.kill(pid)
        assert stdout.read() == ""  # the child has ended, too
    for child in children:
        tasks.wait_gone(child.pid)
    server.kill(pid)  # reaped already


def test_a_function_that_is_not_there_is_named_and_the_server_goes_on(tmp_path: Path) -> None:
    server = fork_server.shared()
    with pytest.raises(AssertionError, match=r"test_fork_server:nothing: AttributeError"):
        server.start(f"{_HERE}:nothing", stdout=tmp_path / "out", stderr=tmp_path / "err")
    assert psutil.Process(server.pid).children() == []
