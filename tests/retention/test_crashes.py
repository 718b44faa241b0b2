"""Killed while checkpoints are removed: what looks like a checkpoint is one; whoever comes next removes the rest."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from stager import Checkpointer
from stager.workers.checkpoint.directory.run_directory import list_checkpoints, removing_names
from stager.workers.checkpoint.maintenance.recover import RecoverOutcome, recover
from stager.workers.checkpoint.maintenance.retention import PruneFate, prune
from stager.workers.checkpoint.maintenance.retention_rules import RetentionRules
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.errors import StorageError
from tests import scripts
from tests.faults import Faults
from tests.observed import workers_of
from tests.persistence.tasks import Crash, failing_call, in_turn
from tests.retention.runs import make_run, steps_of

RULES = RetentionRules(keep_latest=1)
CONFIG = {"workers": {"count": 1}, "persistence": {"fsync": False}, "retention": {"keep_latest": 2}}


def whole(run_dir: Path) -> list[int]:
    """Steps of what looks like a checkpoint; each is one."""
    found, _ = list_checkpoints(run_dir)
    assert all(verify_checkpoint(info.path).ok for info in found)
    return [info.step for info in found]


def test_crash_at_each_system_call_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        run_dir = make_run(tmp_path / str(number), (1, 2, 3))
        with failing_call(number, Crash) as reached, suppress(Crash):
            prune(str(run_dir), RULES)
        assert 3 in whole(run_dir)
        if number % 2:  # who comes next: a run, or another prune
            found = recover(str(run_dir))
            assert {item.outcome for item in found} <= {RecoverOutcome.REMOVED}
            assert not removing_names(str(run_dir))
        prune(str(run_dir), RULES)
        assert steps_of(run_dir) == [3] and os.listdir(run_dir) == ["step-00000003"]
        shutil.rmtree(run_dir)
        return reached()

    assert in_turn(attempt) > 25


def test_error_at_each_system_call_is_told_and_harms_nothing(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        run_dir = make_run(tmp_path / str(number), (1, 2))
        left = None
        with failing_call(number, lambda name: OSError(errno.EIO, os.strerror(errno.EIO))) as reached:
            with suppress(StorageError):  # the directory cannot be read, or synced
                left = prune(str(run_dir), RULES).steps(PruneFate.LEFT)
        remaining = whole(run_dir)
        assert 2 in remaining
        assert left != [] or remaining == [2]  # it says so when something is left
        seen.append(left)
        prune(str(run_dir), RULES)
        assert steps_of(run_dir) == [2] and os.listdir(run_dir) == ["step-00000002"]
        shutil.rmtree(run_dir)
        return reached()

    seen: list[list[int] | None] = []
    assert in_turn(attempt) > 15
    assert [1] in seen and None in seen


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((1000,), float(step))}


POINTS = {
    "prune.begin": "kill",
    "prune.verified": "kill",
    "prune.renamed": "kill",
    "prune.removing": "kill after=2",
    "prune.removed": "kill",
    "task.reply": "kill after=1",
}


@pytest.mark.parametrize(
    "point",
    [p if p == "prune.removing" else pytest.param(p, marks=pytest.mark.long) for p in POINTS],
)
def test_worker_killed_at_each_point_of_removing_and_another_goes_on(run_dir: Path, faults: Faults, point: str) -> None:
    make_run(run_dir, (0, 1))
    with Checkpointer(run_dir, {**CONFIG, "retention": {"keep_latest": 1}}) as ckpt:
        faults.arm(point, POINTS[point])
        ckpt.save(2, state_of(2)).upload_completion.result()
        ckpt.prune()  # in line behind the one that the commit has begun
        assert faults.fired(point)
        assert steps_of(run_dir) == [2]


TRAINER = """
import sys
from stager import Checkpointer
from tests.retention.test_crashes import CONFIG, state_of
with Checkpointer(sys.argv[1], {**CONFIG, "retention": {"keep_latest": 1}}) as ckpt:
    ckpt.save(2, state_of(2))
"""


@pytest.mark.parametrize("point", ["prune.renamed", pytest.param("prune.removing", marks=pytest.mark.long)])
def test_everybody_killed_while_one_is_removed_and_the_next_run_goes_on(
    run_dir: Path, faults: Faults, point: str
) -> None:
    make_run(run_dir, (1,))
    hold = faults.hold(point, after=2 if point == "prune.removing" else 0)
    with scripts.running(TRAINER, run_dir) as trainer:
        hold.wait()
        (worker,) = map(psutil.Process, workers_of(trainer.pid))
        trainer.kill(signal.SIGKILL)
        worker.kill()
    psutil.wait_procs([worker])
    assert whole(run_dir) == [2] and len(removing_names(str(run_dir))) == 1
    with Checkpointer(run_dir, CONFIG) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [2]
        assert not removing_names(str(run_dir))


def test_two_prune_at_once(run_dir: Path, faults: Faults) -> None:
    """1. a worker has renamed, and is held. 2. somebody else prunes. 3. the worker goes on."""
    make_run(run_dir, (1, 2, 3))
    hold = faults.hold("prune.renamed")
    with Checkpointer(run_dir, CONFIG) as ckpt:
        handle = ckpt.save(4, state_of(4))
        hold.wait()
        handle.upload_completion.result()
        assert prune(str(run_dir), RULES).steps(PruneFate.REMOVED) == [3]
        hold.release()
    assert steps_of(run_dir) == [4]
    assert sorted(os.listdir(run_dir)) == [".stager.lock", "step-00000004"]
