"""Waits of a Checkpointer that get long are logged: the lock, a buffer, a snapshot."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from stager.arena.arena import Arena
from stager.saving.staging_thread import StagingThread
from stager.workers import long_wait
from stager.workers.checkpoint.storage.posix.run_lock import lock_directory
from stager.workers.errors import DirectoryInUseError


class _Saying(logging.Handler):
    """Releases whoever waits for it when a wait is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said = threading.Event()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.said.set()


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> _Saying:
    """Every wait is long."""
    monkeypatch.setattr(long_wait, "LONG_SECS", 0.0)
    handler = _Saying()
    monkeypatch.setattr(logging.getLogger("stager"), "handlers", [handler])
    return handler


def test_lock_of_another_run(tmp_path: Path, saying: _Saying) -> None:
    """1. a run holds the lock. 2. the next one waits, and says so. 3. the first one lets go."""
    held = lock_directory(str(tmp_path), 0)
    taken: list[int] = []
    next_run = threading.Thread(target=lambda: taken.append(lock_directory(str(tmp_path), 600)))
    next_run.start()
    saying.said.wait()
    os.close(held)
    next_run.join()
    os.close(taken[0])
    assert saying.messages == [
        f"waiting for the run of process {os.getpid()}, or workers that it left, to let go of {tmp_path}, for 600 s at most"
    ]


def test_lock_that_is_not_waited_for_says_nothing(tmp_path: Path, saying: _Saying) -> None:
    held = lock_directory(str(tmp_path), 0)
    with pytest.raises(DirectoryInUseError):
        lock_directory(str(tmp_path), 0)
    os.close(held)
    assert saying.messages == []


def test_buffer(saying: _Saying) -> None:
    arena = Arena(2, 1 << 20, "wait", prefault=False)
    leases = [arena.lease(4096), arena.lease(4096)]
    waiting = threading.Thread(target=lambda: leases.append(arena.lease(4096)))
    waiting.start()
    saying.said.wait()
    first = leases.pop(0)
    assert first is not None
    first.release()
    waiting.join()
    for lease in leases:
        assert lease is not None
        lease.release()
    arena.close()
    (message,) = saying.messages
    assert (
        message.startswith("waiting for a free buffer for the snapshot, without a time limit: all hold")
        and "arena.when_full" in message
    )


def test_snapshot(saying: _Saying) -> None:
    thread, goes_on = StagingThread(), threading.Event()

    def block() -> None:
        goes_on.wait()

    thread.run(block)
    waiting = threading.Thread(target=thread.wait)
    waiting.start()
    saying.said.wait()
    goes_on.set()
    waiting.join()
    thread.close()
    assert saying.messages == ["waiting for a snapshot to be taken, without a time limit"]
