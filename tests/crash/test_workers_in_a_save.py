"""A worker dies, or can do nothing any more, at each point of a save, in every way: the save commits all the same, or fails
with an error that says where."""

from __future__ import annotations

import os
import signal
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, SaveHandle
from stager.workers import RemoteTraceback
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults
from tests.observed import child_pids
from tests.states import same

# In order. "after=1": the second visit of the process that gets there, which is in the middle.
POINTS = {
    "task.receive": "",
    "part.begin": "",
    "part.opened": "",
    "part.write": "after=1",
    "part.written": "",
    "part.synced": "",
    "part.receipt": "",
    "commit.begin": "",
    "commit.indexed": "",
    "commit.manifest": "",
    "commit.replaced": "",
    "commit.published": "",
    "task.reply": "",
}
WAYS = ("kill", "segv", "exit", "stop")
CONFIG = {
    "workers": {"count": 2, "heartbeat_timeout_secs": 1.0},
    "persistence": {"segment_bytes": "256KiB", "fsync": False},
}


def state_of(number: int) -> dict[str, object]:
    return {"x": torch.full((4 << 20,), number % 256, dtype=torch.uint8), "n": number}


def committed(ckpt: Checkpointer, handle: SaveHandle, number: int) -> None:
    info = handle.upload_completion.result()
    assert verify_checkpoint(info.path).problems == ()
    loaded = ckpt.load(handle.step)
    assert loaded is not None and same(loaded.state, state_of(number))


def save_through(run_dir: Path, faults: Faults, cases: list[tuple[str, str]]) -> None:
    """Every save replaces the same step, so each goes through every point."""
    with Checkpointer(run_dir, CONFIG) as ckpt:
        committed(ckpt, ckpt.save(1, state_of(0)), 0)
        for number, (point, way) in enumerate(cases, 1):
            faults.arm(point, f"{way} {POINTS[point]}")
            committed(ckpt, ckpt.save(1, state_of(number)), number)
            assert faults.fired(point), (point, way)
    assert [path.name for path in run_dir.glob("step*")] == ["step-00000001"]


def test_worker_stopped_in_the_middle_of_a_write_and_the_save_commits_within_the_deadline(
    run_dir: Path, faults: Faults
) -> None:
    save_through(run_dir, faults, [("part.write", "stop")])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_worker_dies_in_every_way_at_each_point_and_the_save_commits(run_dir: Path, faults: Faults, way: str) -> None:
    save_through(run_dir, faults, [(point, way) for point in POINTS])


def test_sigterm_at_any_point_of_a_save_changes_nothing(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        committed(ckpt, ckpt.save(1, state_of(0)), 0)
        pids = child_pids()
        for number, point in enumerate(POINTS, 1):
            faults.arm(point, f"term {POINTS[point]}")
            committed(ckpt, ckpt.save(1, state_of(number)), number)
            assert faults.fired(point), point
        assert child_pids() == pids


def test_exception_at_any_point_of_a_part_is_in_the_future_with_the_worker_s_traceback(
    run_dir: Path, faults: Faults
) -> None:
    """No storage error, but a bug of ours, say. The one who looks is told where it was; the next save works. (Once its
    receipt is there, a part needs nobody any more: the other worker commits.)"""
    points = [point for point in POINTS if point.startswith("part.") and point != "part.receipt"]
    with Checkpointer(run_dir, CONFIG) as ckpt:
        for step, point in enumerate(points):
            faults.arm(point, f"raise {POINTS[point]}")
            error = ckpt.save(2 * step, state_of(step)).upload_completion.exception()
            assert isinstance(error, RuntimeError) and isinstance(error.__cause__, RemoteTraceback), point
            assert "in point" in str(error.__cause__) or "in _visit" in str(error.__cause__)
            assert not list(run_dir.glob("*.partial-*")), point
            committed(ckpt, ckpt.save(2 * step + 1, state_of(step)), step)


@pytest.mark.parametrize("last", ["errno EIO", "raise"])
def test_error_of_a_worker_reaches_the_next_save_with_its_traceback_and_masks_nothing(
    last: str, run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody looks at the Future: the next ``save()`` raises it. What leaves the ``with`` block comes first, though."""
    with pytest.raises(KeyError, match="primary"), Checkpointer(run_dir, CONFIG) as ckpt:
        faults.arm("part.begin", "raise")
        wait([ckpt.save(0, state_of(0)).upload_completion])  # which is not looking at its error
        with pytest.raises(RuntimeError, match="raised by a test") as caught:
            ckpt.save(1, state_of(1))
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        committed(ckpt, ckpt.save(2, state_of(2)), 2)
        faults.arm("part.begin", last)
        ckpt.save(3, state_of(3))
        raise KeyError("primary")
    assert "failed as well, after an error in its with block" in caplog.text


def test_worker_that_a_user_stops_and_continues_goes_on(run_dir: Path, faults: Faults) -> None:
    """Shorter than the heartbeat's timeout: nothing is lost, not even the worker."""
    with Checkpointer(run_dir, {**CONFIG, "workers": {"count": 1}}) as ckpt:
        hold = faults.hold("part.write")
        handle = ckpt.save(1, state_of(1))
        hold.wait()
        (pid,) = child_pids()
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
        hold.release()
        committed(ckpt, handle, 1)
        assert child_pids() == [pid]
