"""``delete()`` of a save in flight: it is cancelled, at once, and does not appear later. NOTE [ Withdrawing a save ]."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stager import CancelledEvent, Checkpointer, Event, PathCheckpointer, PruneFate, SaveState, UsageError
from tests.faults import Faults
from tests.staging.ranks import run_ranks


def config(**more: Any) -> dict[str, Any]:
    return {"workers": {"count": 1}, "persistence": {"fsync": False, "segment_bytes": "1MiB"}, **more}


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


@pytest.mark.parametrize("point", ["part.begin", "part.opened", "part.write", "part.written", "part.synced"])
def test_wherever_the_worker_is_the_save_is_cancelled_and_nothing_is_left(
    run_dir: Path, faults: Faults, point: str
) -> None:
    """1. the worker stops at a point 2. the directory is withdrawn 3. the worker goes on, and notices."""
    events: list[Event] = []
    with Checkpointer(run_dir, config(), on_event=events.append) as ckpt:
        ckpt.save(1, {"x": torch.ones(10)}).upload_completion.result()
        with faults.hold(point) as hold:
            handle = ckpt.save(2, {"x": torch.ones(3 << 20)})
            hold.wait()
            with faults.hold("withdraw.synced") as withdrawn:
                reports: list[Any] = []
                deleting = threading.Thread(target=lambda: reports.append(ckpt.delete(2)))
                deleting.start()
                withdrawn.wait()
                hold.release()
                withdrawn.release()
                deleting.join()
        assert reports[0].steps(PruneFate.REMOVED) == [2]
        assert handle.state is SaveState.CANCELLED and handle.upload_completion.cancelled()
        with pytest.raises(CancelledError):
            handle.upload_completion.result()
        assert names(run_dir) == ["step-00000001"]
        assert ckpt.save(2, {"x": torch.zeros(10)}).upload_completion.result().step == 2  # the step may be saved again
    assert sum(isinstance(event, CancelledEvent) for event in events) == 1
    assert names(run_dir) == ["step-00000001", "step-00000002"]


def test_one_that_was_committed_just_before_is_removed(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config()) as ckpt, faults.hold("commit.published") as hold:
        handle = ckpt.save(1, {"x": torch.ones(10)})
        hold.wait()
        deleting = threading.Thread(target=lambda: ckpt.delete(1))
        deleting.start()
        hold.release()
        deleting.join()
        assert handle.upload_completion.result().step == 1
        assert ckpt.checkpoints() == []
    assert names(run_dir) == []


def test_while_the_snapshot_is_still_copied(run_dir: Path, faults: Faults) -> None:
    model = nn.Linear(1024, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.guard(optimizer)
        with faults.hold("save.overlapped") as hold:
            handle = ckpt.save(1, {"model": model})
            hold.wait()
            deleting = threading.Thread(target=lambda: ckpt.delete(1))
            deleting.start()
            hold.release()
            deleting.join()
        assert handle.state in (SaveState.CANCELLED, SaveState.COMMITTED)
        assert names(run_dir) == []


def test_a_protected_one_is_refused_and_its_save_goes_on(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        ckpt.protect(1)
        with faults.hold("part.write") as hold:
            handle = ckpt.save(1, {"x": torch.ones(10)})
            hold.wait()
            with pytest.raises(UsageError, match=r"call unprotect\(1\) first"):
                ckpt.delete(1)
            hold.release()
        assert handle.upload_completion.result().step == 1


def test_of_several_ranks_the_save_is_cancelled_on_all(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:delete_in_flight_on_rank_0", 2, tmp_path)
    assert results == [["cancelled", True, False, 4]] * 2


def test_by_path(tmp_path: Path, faults: Faults) -> None:
    with PathCheckpointer(config()) as ckpt:
        path = tmp_path / "out" / "last.ckpt"
        for _ in range(3):
            handle = ckpt.save(path, {"x": torch.ones(3 << 20)})
            ckpt.delete(path)
            assert handle.state in (SaveState.CANCELLED, SaveState.COMMITTED)
            assert names(path.parent) == []
        ckpt.save(path, {"x": torch.ones(3)})
    assert names(path.parent) == ["last.ckpt"]
