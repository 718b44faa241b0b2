"""The trainer is killed while it deletes a checkpoint whose save is in flight: NOTE [ Withdrawing a save ]."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.crash.aftermath import committed_steps, recover_as_the_next_run, wait_for_workers_to_end
from tests.crash.nursery import Nursery
from tests.faults import Faults


@pytest.mark.parametrize("worker_is_at", ["part.begin", "part.write", "part.receipt"])
@pytest.mark.parametrize("point", ["withdraw.marked", "withdraw.synced"])
def test_the_workers_do_not_commit_what_was_withdrawn(
    run_dir: Path, faults: Faults, nursery: Nursery, point: str, worker_is_at: str
) -> None:
    """1. a worker stops 2. the trainer begins to delete, and is killed 3. the worker goes on.

    Before the partial directory has lost its name, the worker may commit it: delete() has not returned.
    """
    writing = faults.hold(worker_is_at, after=1)  # in its second save
    handed_over = faults.hold("save.handed-over", after=1)
    deleting = faults.hold(point)
    with nursery.start("tests.crash.trainers:delete_in_flight", str(run_dir)) as trainer:
        assert trainer.read() == "base"
        with writing:
            handed_over.wait()
            writing.wait()
            handed_over.release()
            deleting.wait()
            trainer.send(signal.SIGKILL)
            assert trainer.wait() == -signal.SIGKILL
            writing.release()
    wait_for_workers_to_end()
    recover_as_the_next_run(run_dir)
    allowed = [[0]] if point == "withdraw.synced" else [[0], [0, 1], [1, 0]]
    assert committed_steps(run_dir) in allowed
    assert not [name for name in os.listdir(run_dir) if ".partial-" in name or ".removing-" in name]
