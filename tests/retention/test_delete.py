"""``delete(step)``: one checkpoint goes, the others stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import (
    Checkpointer,
    CheckpointNotFoundError,
    ClosedError,
    Event,
    PrunedEvent,
    PruneFate,
    StorageError,
    UsageError,
)
from stager.workers.checkpoint.directory.reading import reading
from tests.retention.runs import make_run, steps_of
from tests.staging.ranks import run_ranks


def config(**persistence: Any) -> dict[str, Any]:
    return {"workers": {"count": 1}, "persistence": {"fsync": False, **persistence}}


def test_a_checkpoint_is_removed_and_told(run_dir: Path) -> None:
    make_run(run_dir, (1, 2, 3))
    events: list[Event] = []
    with Checkpointer(run_dir, config(), on_event=events.append) as ckpt:
        report = ckpt.delete(2)
        assert report.steps(PruneFate.REMOVED) == [2] and report.freed_bytes > 0
        assert steps_of(run_dir) == [1, 3]
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 2"):
            ckpt.delete(2)
        with pytest.raises(ValueError, match="step must be"):
            ckpt.delete(-1)
    (event,) = events
    assert isinstance(event, PrunedEvent) and event.report == report
    with pytest.raises(ClosedError):
        ckpt.delete(1)


def test_a_protected_one_is_refused_and_the_advice_works(run_dir: Path) -> None:
    make_run(run_dir, (1, 2))
    with Checkpointer(run_dir, {**config(), "retention": {"protect": [2]}}) as ckpt:
        ckpt.protect(1)
        with pytest.raises(UsageError, match=r"call unprotect\(1\) first"):
            ckpt.delete(1)
        with pytest.raises(UsageError, match=r"is in retention\.protect"):
            ckpt.delete(2)
        ckpt.unprotect(1)
        ckpt.delete(1)
    assert steps_of(run_dir) == [2]


def test_what_shares_files_with_it_stays_whole_and_the_next_save_links_nothing_to_it(run_dir: Path) -> None:
    with Checkpointer(run_dir, config(incremental=True)) as ckpt:
        for step in range(3):
            state = {"frozen": torch.ones(100_000), "x": torch.full((9,), step)}
            ckpt.save(step, state).upload_completion.result()
        ckpt.delete(0)
        ckpt.delete(2)
        handle = ckpt.save(3, state)
        assert handle.upload_completion.result().linked_bytes == 0
    assert steps_of(run_dir) == [1, 3]


def test_one_that_is_read_and_one_that_is_none_are_left_and_named(run_dir: Path) -> None:
    make_run(run_dir, (1,))
    (run_dir / "step-00000002").mkdir()
    with Checkpointer(run_dir, config()) as ckpt:
        with reading(str(run_dir / "step-00000001")), pytest.raises(StorageError, match="it is being read"):
            ckpt.delete(1)
        with pytest.raises(StorageError, match="it has no manifest"):
            ckpt.delete(2)
    assert (run_dir / "step-00000001").exists()


def test_delete_in_a_listener_is_refused(run_dir: Path) -> None:
    make_run(run_dir, (1,))
    errors: list[str] = []

    def listener(_: Event) -> None:
        try:
            ckpt.delete(1)
        except UsageError as error:
            errors.append(str(error))

    with Checkpointer(run_dir, config(), on_event=listener) as ckpt:
        ckpt.save(2, {"x": torch.ones(1)}).upload_completion.result()
    assert len(errors) == 4 and "by a listener" in errors[0]


def test_of_several_ranks_each_may_call_it(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:delete_on_each_rank", 2, tmp_path)
    assert [1] in [removed for removed, _ in results]
    assert all(steps == [2] for _, steps in results)


def test_no_rank_waits_to_see_the_newest_checkpoint_that_another_has_deleted(tmp_path: Path) -> None:
    assert run_ranks("tests.ranks.bodies:delete_the_newest_on_one_rank", 2, tmp_path) == [[1, None], [1, None]]
