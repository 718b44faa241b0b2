"""Retention as a trainer has it: after each commit, on demand, and what is protected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, ClosedError, UsageError
from stager.workers.checkpoint.maintenance.retention import PruneFate
from tests.faults import Faults
from tests.retention.runs import damage, everything_in, make_run, steps_of


def config(**retention: Any) -> dict[str, Any]:
    return {"workers": {"count": 1}, "persistence": {"fsync": False}, "retention": retention}


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((1000,), float(step))}


def test_after_each_commit_and_after_the_last_one(run_dir: Path) -> None:
    with Checkpointer(run_dir, config(keep_latest=2, keep_every=4)) as ckpt:
        for step in range(7):
            ckpt.save(step, state_of(step))
    assert steps_of(run_dir) == [0, 4, 5, 6]


def test_without_rules_all_stay(run_dir: Path) -> None:
    with Checkpointer(run_dir, config()) as ckpt:
        for step in range(4):
            ckpt.save(step, state_of(step))
        assert ckpt.prune().steps(PruneFate.REMOVED) == []
    assert steps_of(run_dir) == [0, 1, 2, 3]


def test_protected_steps_stay_in_this_run_and_the_next(run_dir: Path) -> None:
    with Checkpointer(run_dir, config(keep_latest=1, protect=[1])) as ckpt:
        for step in range(4):
            if step == 2:
                ckpt.protect(2)  # it is still to come
            ckpt.save(step, state_of(step))
    assert steps_of(run_dir) == [1, 2, 3]
    with Checkpointer(run_dir, config(keep_latest=1)) as ckpt:
        assert ckpt.prune().steps(PruneFate.REMOVED) == [1]
        ckpt.unprotect(2)
        ckpt.unprotect(5)
        assert ckpt.prune().steps(PruneFate.REMOVED) == [2]
    assert steps_of(run_dir) == [3]


def test_dry_run_changes_nothing_and_needs_no_run(run_dir: Path) -> None:
    make_run(run_dir, (1, 2, 3))
    before = everything_in(run_dir)
    with Checkpointer(run_dir, config(keep_latest=1), read_only=True) as reader:
        assert reader.prune(dry_run=True).steps(PruneFate.REMOVED) == [2, 1]
        with pytest.raises(ClosedError, match="read_only"):
            reader.prune()
        with pytest.raises(ClosedError, match="read_only"):
            reader.protect(1)
    assert everything_in(run_dir) == before
    with Checkpointer(run_dir, config(keep_latest=1)) as ckpt:
        assert ckpt.prune(dry_run=True).steps(PruneFate.REMOVED) == [2, 1]
        assert steps_of(run_dir) == [1, 2, 3]
        with pytest.raises(ValueError, match="step must be an integer"):
            ckpt.protect(-1)
    with pytest.raises(ClosedError):
        ckpt.prune(dry_run=True)


def test_what_is_left_is_logged_and_the_save_has_not_failed(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(run_dir, (1, 2))
    damage(run_dir, 2)
    with Checkpointer(run_dir, config(keep_latest=2)) as ckpt:
        handle = ckpt.save(3, state_of(3))
        handle.upload_completion.result()
        report = ckpt.prune()
    assert report.steps(PruneFate.LEFT) == [] and report.damaged == []  # only the newest is hashed
    assert handle.upload_completion.exception() is None
    (run_dir / ".stager.protected").write_bytes(b"?")
    with Checkpointer(run_dir, config(keep_latest=1)) as ckpt:
        ckpt.save(4, state_of(4)).upload_completion.result()
    assert f"old checkpoints of {run_dir} were not removed" in caplog.text


def test_prune_in_a_callback_is_refused(run_dir: Path) -> None:
    errors: list[BaseException] = []

    def callback(_: object) -> None:
        try:
            ckpt.prune()
        except UsageError as error:
            errors.append(error)

    with Checkpointer(run_dir, config(keep_latest=1)) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.add_done_callback(callback)
    assert len(errors) == 1


def test_save_goes_on_while_old_ones_are_removed(run_dir: Path, faults: Faults) -> None:
    """Two workers: one is held in the middle of a removal, the other does the next save."""
    make_run(run_dir, (1, 2))
    with Checkpointer(run_dir, {**config(keep_latest=1), "workers": {"count": 2}}) as ckpt:
        hold = faults.hold("prune.removing")
        ckpt.save(3, {"n": 3}).upload_completion.result()
        hold.wait()
        handle = ckpt.save(4, {"n": 4})
        hold.release()
        assert handle.upload_completion.result().step == 4
    assert steps_of(run_dir) == [4]
