"""A damaged checkpoint is never loaded: latest() and load() fall back to the one before, load(step) refuses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, CheckpointNotFoundError, CorruptCheckpointError
from tests.persistence.jobs import save
from tests.states import same
from workers.verify import verify_checkpoint


def state_of(step: int) -> dict[str, object]:
    return {"x": torch.full((1000,), float(step)), "y": {"z": torch.arange(step + 3)}, "n": step}


@pytest.fixture
def checkpoints(run_dir: Path) -> Path:
    """Steps 10, 20 and 30 in a run's directory."""
    for step in (10, 20, 30):
        save(run_dir, state_of(step), step=step, num_files=2)
    return run_dir


def flip_bit(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_one_flipped_bit_in_each_file_in_turn(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000030"
    names = sorted(path.name for path in newest.iterdir())
    assert names == [".metadata", "__0_0.distcp", "__0_1.distcp", "__0_objects.distcp", "manifest.json"]
    for name in names:
        size = (newest / name).stat().st_size
        for position in (0, size // 2, size - 1):
            flip_bit(newest / name, position)
            assert not verify_checkpoint(newest).ok
            with Checkpointer(checkpoints, read_only=True) as ckpt:
                latest = ckpt.latest()
                assert latest is not None and latest.step == 20
                assert [(s.name, name in s.reason) for s in ckpt.skipped] == [("step-00000030", True)]
                with pytest.raises(CorruptCheckpointError, match=name.replace(".", r"\.")):
                    ckpt.load(30)
                loaded = ckpt.load()
                assert loaded is not None and loaded.step == 20 and same(loaded.state, state_of(20))
                assert [s.name for s in ckpt.skipped] == ["step-00000030"]
            flip_bit(newest / name, position)
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        latest = ckpt.latest()
        assert latest is not None and latest.step == 30 and ckpt.skipped == []


def test_missing_extra_and_truncated_files(checkpoints: Path) -> None:
    original = shutil.copytree(checkpoints / "step-00000030", checkpoints.parent / "original")
    newest = checkpoints / "step-00000030"
    for name in sorted(os.listdir(original)):
        for spoil in (lambda path: path.unlink(), lambda path: os.truncate(path, path.stat().st_size - 1)):
            spoil(newest / name)
            with Checkpointer(checkpoints, read_only=True) as ckpt:
                latest = ckpt.latest()
                assert latest is not None and latest.step == 20
                with pytest.raises((CorruptCheckpointError, CheckpointNotFoundError)):
                    ckpt.load(30)
            shutil.rmtree(newest)
            shutil.copytree(original, newest)
    (newest / "extra").touch()
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        latest = ckpt.latest()
        assert latest is not None and latest.step == 20 and "extra" in ckpt.skipped[0].reason


def test_all_are_damaged(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        flip_bit(path / "__0_0.distcp", 100)
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        assert ckpt.latest() is None and ckpt.load() is None
        assert [s.name for s in ckpt.skipped] == ["step-00000030", "step-00000020", "step-00000010"]
        assert [info.step for info in ckpt.checkpoints()] == [10, 20, 30]  # by their manifests


def test_partial_directories_are_skipped_with_the_reason(checkpoints: Path) -> None:
    partial = checkpoints / "step-00000040.partial-ab"
    shutil.copytree(checkpoints / "step-00000030", partial)
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        latest = ckpt.latest()
        assert latest is not None and latest.step == 30
        assert [(s.name, s.reason.partition(":")[0]) for s in ckpt.skipped] == [(partial.name, "partial")]
        with pytest.raises(CheckpointNotFoundError):
            ckpt.load(40)
    shutil.rmtree(partial)


def test_damage_is_refused_before_a_target_is_touched(checkpoints: Path) -> None:
    """Loading verifies in full first, by default."""
    newest = checkpoints / "step-00000030"
    flip_bit(newest / "__0_1.distcp", 900)
    into = {"x": torch.zeros(1000), "y": {"z": torch.zeros(33, dtype=torch.int64)}, "n": None}
    with Checkpointer(checkpoints, read_only=True) as ckpt, pytest.raises(CorruptCheckpointError):
        ckpt.load(30, into=into)
    assert same(into, {"x": torch.zeros(1000), "y": {"z": torch.zeros(33, dtype=torch.int64)}, "n": None})


def test_quick_verification_trusts_the_bytes_until_they_are_read(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000030"
    flip_bit(newest / "__0_0.distcp", 900)
    with Checkpointer(checkpoints, {"loading": {"verify": "quick"}}, read_only=True) as ckpt:
        latest = ckpt.latest()
        assert latest is not None and latest.step == 30
        with pytest.raises(CorruptCheckpointError, match=r"damaged \(x\)"):
            ckpt.load(30)


def test_nothing_to_load(run_dir: Path) -> None:
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert ckpt.latest() is None and ckpt.load() is None and ckpt.checkpoints() == []
        with pytest.raises(CheckpointNotFoundError):
            ckpt.load(3)
    assert not run_dir.exists()
