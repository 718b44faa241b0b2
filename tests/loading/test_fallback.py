"""A damaged checkpoint is never loaded: latest() and load() fall back to the one before, load(step) refuses."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, CheckpointNotFoundError, CorruptCheckpointError, StorageError
from stager.loading.restore import Restorer
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.persistence.tasks import save
from tests.states import same


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


def test_missing_and_truncated_files(checkpoints: Path) -> None:
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


def test_damaged_step_that_was_asked_for_names_the_others(checkpoints: Path) -> None:
    os.truncate(checkpoints / "step-00000020" / "__0_0.distcp", 100)
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        with pytest.raises(CorruptCheckpointError, match=r"100 bytes long.*from a copy, or load another step: 30, 10$"):
            ckpt.load(20)
    with Checkpointer(checkpoints / "step-00000020", read_only=True) as ckpt:
        with pytest.raises(CorruptCheckpointError, match=r"or open its run and load another step$"):
            ckpt.load()


def test_only_checkpoint_is_damaged(checkpoints: Path) -> None:
    for step in (10, 20):
        shutil.rmtree(checkpoints / f"step-000000{step}")
    os.truncate(checkpoints / "step-00000030" / "__0_0.distcp", 100)
    for step in (None, 30):
        with (
            Checkpointer(checkpoints, read_only=True) as ckpt,
            pytest.raises(CorruptCheckpointError, match=r"the run has no other checkpoint: .* remove step-00000030"),
        ):
            ckpt.load(step)


def test_all_are_damaged(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        flip_bit(path / "__0_0.distcp", 100)
    with Checkpointer(checkpoints, read_only=True) as ckpt:
        assert ckpt.latest() is None
        with pytest.raises(
            CorruptCheckpointError, match=r"step-00000030.*none of the 3 checkpoints .*steps 30, 20, 10.*to begin anew"
        ):
            ckpt.load()  # None would say that there is nothing to resume from
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


def blank() -> dict[str, object]:
    return {"x": torch.zeros(1000), "y": {"z": torch.zeros(33, dtype=torch.int64)}, "n": None}


def restructured(run_dir: Path) -> None:
    """Step 20 is all there is to fall back to, and has another structure."""
    shutil.rmtree(run_dir / "step-00000010")
    shutil.rmtree(run_dir / "step-00000020")
    save(run_dir, {"x": torch.ones(1000)}, step=20)


def alone(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "step-00000010")
    shutil.rmtree(run_dir / "step-00000020")


def test_damage_found_while_reading_in_place_falls_back_and_overwrites_all_of_it(run_dir: Path) -> None:
    for step in (10, 20, 30):
        save(
            run_dir, {"x": torch.full((1000,), float(step)), "y": {"z": torch.arange(33) + step}, "n": step}, step=step
        )
    flip_bit(run_dir / "step-00000030" / "__0_0.distcp", 900)
    into = blank()
    with Checkpointer(run_dir, read_only=True) as ckpt:
        loaded = ckpt.load(into=into)
        assert loaded is not None and loaded.step == 20
        assert [s.name for s in ckpt.skipped] == ["step-00000030"]
    assert same(into, {"x": torch.full((1000,), 20.0), "y": {"z": torch.arange(33) + 20}, "n": 20})


@pytest.mark.parametrize("others", [alone, restructured], ids=["no other", "one that does not fit"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_partly_overwritten_is_never_passed_off_as_good(run_dir: Path, others: Any, strict: bool) -> None:
    """Neither None, which is to go on from what is there, nor an error that says that nothing was changed."""
    for step in (10, 20, 30):
        save(run_dir, state_of(30), step=step)
    others(run_dir)
    flip_bit(run_dir / "step-00000030" / "__0_0.distcp", 900)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        for step in (None, 30):
            with pytest.raises(CorruptCheckpointError, match=r"step-00000030.*partly overwritten.*verify_first"):
                ckpt.load(step, into=blank(), strict=strict)


def test_device_that_fails_while_reading_in_place_is_said_to_have_left_part(run_dir: Path) -> None:
    path = save(run_dir, state_of(30), step=30).path
    manifest = read_manifest(path)
    original = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if "_0.distcp" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "faulty")
        return original(fd, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(StorageError, match="partly overwritten"):
            Restorer(path, manifest, 1, False).load_into(blank(), True)


def test_verify_first_refuses_damage_before_a_target_is_touched(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000030"
    flip_bit(newest / "__0_1.distcp", 900)
    into = blank()
    config = {"loading": {"verify_first": True, "verify": "quick"}}
    with Checkpointer(checkpoints, config, read_only=True) as ckpt:
        latest = ckpt.latest()  # quick, and not taken for more
        assert latest is not None and latest.step == 30
        with pytest.raises(CorruptCheckpointError):
            ckpt.load(30, into=into)
    assert same(into, blank())


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


def test_damage_where_no_value_lies_is_found_too(run_dir: Path) -> None:
    """The directory at the end of a .pt file is nobody's value, and still a part of what is loaded."""
    path = Path(save(run_dir, state_of(1), step=1, kind="torch").path, "state.pt")
    flip_bit(path, path.stat().st_size - 3)
    with (
        Checkpointer(run_dir, read_only=True) as ckpt,
        pytest.raises(CorruptCheckpointError, match="what stands around the values"),
    ):
        ckpt.load(1)
