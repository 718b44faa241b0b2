"""Retention as a trainer has it: after each commit, on demand, and what is protected."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, ClosedError, Event, PrunedEvent, UsageError
from stager.saving.retainer import change_protected
from stager.workers.checkpoint.directory.protected import read_protected
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


def test_a_dry_run_tells_no_listener_and_the_next_save_still_links(run_dir: Path) -> None:
    heard: list[Event] = []
    incremental = {**config(keep_latest=1), "persistence": {"fsync": False, "incremental": True}}
    state = {"frozen": torch.ones(100_000), "x": torch.zeros(9)}
    with Checkpointer(run_dir, {**incremental, "retention": {}}) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state).upload_completion.result()
    with Checkpointer(run_dir, {**incremental, "retention": {}}, on_event=heard.append) as ckpt:
        ckpt.load(1)  # the next save links to what was loaded
        reader = Checkpointer(run_dir, incremental, read_only=True, on_event=heard.append)
        for one in (ckpt, reader):
            assert one.prune(dry_run=True).dry_run
        assert ckpt.save(3, state).upload_completion.result().linked_bytes > 0
    assert not [event for event in heard if isinstance(event, PrunedEvent)]


def test_a_dry_run_of_a_run_that_prunes_removes_nothing_from_what_is_known(run_dir: Path) -> None:
    heard: list[Event] = []
    make_run(run_dir, (1, 2))
    with Checkpointer(run_dir, config(keep_latest=1), on_event=heard.append) as ckpt:
        assert ckpt.prune(dry_run=True).steps(PruneFate.REMOVED) == [1]
    assert steps_of(run_dir) == [1, 2]
    assert not [event for event in heard if isinstance(event, PrunedEvent)]


def test_steps_that_are_protected_at_once_are_all_kept(run_dir: Path) -> None:
    run_dir.mkdir()
    steps = range(40)
    with ThreadPoolExecutor(8) as pool:  # each call opens the directory anew, as processes do
        for _ in pool.map(lambda step: change_protected(str(run_dir), step, keep=True), steps):
            pass
    assert read_protected(str(run_dir)) == set(steps)
