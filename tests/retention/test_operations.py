"""``stager.verify``, ``stager.recover`` and ``stager.prune``: what the commands do, as functions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import stager
from stager import Checkpointer


def save(run_dir: Path, *steps: int) -> None:
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        for step in steps:
            ckpt.save(step, {"w": torch.arange(3000) + step, "n": step}).upload_completion.result(60)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_checkpoint_verifies_and_a_flipped_bit_is_named(run_dir: Path) -> None:
    save(run_dir, 1)
    checkpoint = run_dir / "step-00000001"
    report = stager.verify(checkpoint)
    assert (report.ok, report.problems, report.step, report.num_items) == (True, (), 1, 2)
    flip_bit(checkpoint / "__0_0.distcp")
    assert stager.verify(checkpoint, full=False).ok
    report = stager.verify(checkpoint)
    assert not report.ok and "__0_0.distcp" in report.problems[0]


def test_a_checkpoint_under_the_name_of_another_step_does_not_verify(run_dir: Path) -> None:
    save(run_dir, 1)
    os.rename(run_dir / "step-00000001", run_dir / "step-00000002")
    report = stager.verify(run_dir / "step-00000002")
    assert not report.ok and "step 1" in report.problems[0]


def test_recover_reports_first_and_then_removes_what_was_never_finished(run_dir: Path) -> None:
    save(run_dir, 1)
    partial = run_dir / "step-00000002.partial-0a"
    partial.mkdir()
    for dry_run in (True, False):
        report = stager.recover(run_dir, dry_run=dry_run)
        assert [(item.name, item.outcome) for item in report.found] == [(partial.name, stager.RecoverOutcome.REMOVED)]
        assert report.ok and report.dry_run is dry_run and partial.exists() is dry_run
    assert stager.recover(run_dir).found == ()


def test_recover_refuses_while_a_run_is_alive(run_dir: Path) -> None:
    with (
        Checkpointer(run_dir, {"workers": {"count": 1}}),
        pytest.raises(
            stager.DirectoryInUseError,
            match=r"this process has it open already, .*test_operations\.py:\d+; recover\(\) needs the run for itself",
        ),
    ):
        stager.recover(run_dir)


def test_prune_keeps_what_the_rules_keep(run_dir: Path) -> None:
    save(run_dir, 1, 2, 3, 4)
    report = stager.prune(run_dir, keep_latest=1, protect=[2], dry_run=True)
    assert report.steps(stager.PruneFate.REMOVED) == [3, 1] and report.freed_bytes > 0
    assert len(list(run_dir.glob("step-*"))) == 4
    assert stager.prune(run_dir, keep_latest=1, protect=[2]).steps(stager.PruneFate.KEPT) == [4, 2]
    assert sorted(path.name for path in run_dir.glob("step-*")) == ["step-00000002", "step-00000004"]


def test_prune_without_a_rule_or_of_one_checkpoint_is_refused(run_dir: Path) -> None:
    save(run_dir, 1)
    with pytest.raises(stager.UsageError, match="give at least one"):
        stager.prune(run_dir)
    with pytest.raises(stager.UsageError, match="at least 1"):
        stager.prune(run_dir, keep_latest=0)
    for call in (lambda path: stager.prune(path, keep_latest=1), stager.recover):
        with pytest.raises(stager.UsageError, match="is one checkpoint"):
            call(run_dir / "step-00000001")
        with pytest.raises(stager.CheckpointNotFoundError, match="no such directory"):
            call(run_dir / "nothing")
