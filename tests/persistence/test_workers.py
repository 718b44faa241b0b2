"""Saves by real worker processes that are killed, or told by the file system that they cannot."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import psutil
import pytest
import torch

from stager import Checkpointer, SaveHandle, StorageError
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests import scripts
from tests.faults import Faults
from tests.observed import workers_of
from tests.persistence.tasks import load, save
from tests.states import same

# Every point of a part and of a commit, in order; "after=1" is the second visit of the process that gets there.
POINTS = {
    "part.begin": "kill",
    "part.opened": "kill",
    "part.write": "kill after=1",
    "part.written": "kill",
    "part.synced": "kill",
    "part.receipt": "kill",
    "commit.begin": "kill",
    "commit.indexed": "kill",
    "commit.manifest": "kill",
    "commit.replaced": "kill",
    "commit.published": "kill",
    "task.reply": "kill",
}
CONFIG = {"workers": {"count": 2}, "persistence": {"segment_bytes": "256KiB", "fsync": False}}


def state_of(number: int, mib: int = 6) -> dict[str, object]:
    return {"x": torch.full((mib << 20,), number % 256, dtype=torch.uint8), "n": number}


def committed(ckpt: Checkpointer, handle: SaveHandle, number: int, mib: int = 6) -> None:
    info = handle.upload_completion.result()
    assert verify_checkpoint(info.path).problems == ()
    loaded = ckpt.load(handle.step)
    assert loaded is not None and same(loaded.state, state_of(number, mib))


def test_worker_killed_at_each_point_and_the_save_commits_all_the_same(run_dir: Path, faults: Faults) -> None:
    """Every save replaces the same step, so each goes through every point."""
    with Checkpointer(run_dir, CONFIG) as ckpt:
        committed(ckpt, ckpt.save(1, state_of(0)), 0)
        for number, (point, action) in enumerate(POINTS.items(), 1):
            faults.arm(point, action)
            committed(ckpt, ckpt.save(1, state_of(number)), number)
            assert faults.fired(point), point
        assert [path.name for path in run_dir.glob("step*")] == ["step-00000001"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_worker_killed_in_the_middle_of_writing_20_times(run_dir: Path, faults: Faults) -> None:
    mib = 24  # so that each worker writes three times, at least
    with Checkpointer(run_dir, CONFIG) as ckpt:
        for number in range(20):
            faults.arm("part.write", f"kill after={number % 3}")
            committed(ckpt, ckpt.save(number, state_of(number, mib)), number, mib)
            assert faults.fired("part.write")
        assert len(ckpt.checkpoints()) == 20


def test_storage_error_is_in_the_future_and_harms_nothing_else(run_dir: Path, faults: Faults) -> None:
    cases = {
        "part.begin": "ENOSPC",
        "part.opened": "ESTALE",
        "part.write": "EDQUOT",
        "part.written": "EIO",
        "part.synced": "EIO",
        "commit.begin": "EROFS",
        "commit.indexed": "EIO",
        "commit.manifest": "EACCES",
    }
    with Checkpointer(run_dir, CONFIG) as ckpt:
        for step, (point, code) in enumerate(cases.items()):
            faults.arm(point, f"errno {code}")
            error = ckpt.save(2 * step, state_of(step)).upload_completion.exception()
            assert isinstance(error, StorageError), (point, error)
            assert error.errno == getattr(errno, code) and f"step-{2 * step:08d}.partial-" in error.path
            assert not list(run_dir.glob("*.partial-*")), point
            committed(ckpt, ckpt.save(2 * step + 1, state_of(step)), step)
            assert [info.step for info in ckpt.checkpoints()] == [*range(1, 2 * step + 2, 2)]
        assert all(verify_checkpoint(info.path).ok for info in ckpt.checkpoints())


def test_run_directory_removed_while_a_save_is_written(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, {**CONFIG, "workers": {"count": 1}}) as ckpt:
        hold = faults.hold("part.write")
        handle = ckpt.save(1, state_of(1))
        hold.wait()
        run_dir.rename(run_dir.with_name("gone"))
        hold.release()
        error = handle.upload_completion.exception()
        assert isinstance(error, StorageError) and error.errno == errno.ENOENT
        assert not run_dir.exists()
        for leftover in run_dir.with_name("gone").glob("*.partial-*"):
            leftover.rename(run_dir.with_name("remains"))
        run_dir.with_name("gone").rename(run_dir)
        committed(ckpt, ckpt.save(2, state_of(2)), 2)


TRAINER = """
import sys
from stager import Checkpointer
from tests.persistence.test_workers import CONFIG, state_of
with Checkpointer(sys.argv[1], {**CONFIG, "workers": {"count": 1}}) as ckpt:
    ckpt.save(2, state_of(2))
"""


def kill_everybody(run_dir: Path, faults: Faults, point: str) -> None:
    """A trainer and its worker, SIGKILL, with the worker at ``point`` of a save."""
    hold = faults.hold(point)
    with scripts.running(TRAINER, run_dir) as trainer:
        hold.wait()
        (worker,) = map(psutil.Process, workers_of(trainer.pid))
        trainer.kill(signal.SIGKILL)
        worker.kill()
    psutil.wait_procs([worker])


@pytest.mark.parametrize(
    "point",
    ["part.write", "part.receipt", "commit.manifest"]
    + [
        pytest.param(p, marks=pytest.mark.long)
        for p in POINTS
        if p not in ("part.write", "part.receipt", "commit.manifest", "commit.replaced")
    ],
)
def test_trainer_and_worker_killed_at_a_point(run_dir: Path, faults: Faults, point: str) -> None:
    """The next run finds the checkpoint whole, or removes what is left of it."""
    save(run_dir, state_of(1), step=1)
    kill_everybody(run_dir, faults, point)
    recover(str(run_dir))  # as the next run does before anything else
    found, skipped = list_checkpoints(run_dir)
    assert not skipped
    for info in found:
        assert verify_checkpoint(info.path).problems == () and same(load(info), state_of(info.step))
    assert not list(run_dir.glob("*.partial-*"))
    durable = point in ("part.receipt", "task.reply") or point.startswith("commit.")
    assert [info.step for info in found] == ([1, 2] if durable else [1])
