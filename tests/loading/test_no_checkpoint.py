"""None means that there is no checkpoint: what was one is damaged, and what could be taken for one is named."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from stager import Checkpointer, CorruptCheckpointError, load_checkpoint
from stager.workers.checkpoint.storage.posix.own_files import remove_own
from tests.persistence.tasks import save

STATE = {"w": torch.arange(8.0), "v": torch.ones(3)}


def warnings(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def load(path: Path) -> object:
    with Checkpointer(path, read_only=True) as ckpt:
        return ckpt.load()


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
@pytest.mark.parametrize("has_objects", [False, True])
def test_checkpoint_that_lost_its_manifest_is_damaged(run_dir: Path, kind: str, has_objects: bool) -> None:
    state = {**STATE, "lr": 0.1} if has_objects else STATE
    path = Path(save(run_dir, state, step=5, kind=kind).path)
    (path / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"step-00000005/manifest\.json: is missing"):
        load(run_dir)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        assert ckpt.latest() is None
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: is missing"):
            ckpt.load(5)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: is missing"):
        load(path)


def test_older_one_is_loaded_with_a_warning_where_the_newest_lost_its_manifest(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 5):
        save(run_dir, {"n": step}, step=step)
    (run_dir / "step-00000005" / "manifest.json").unlink()
    with Checkpointer(run_dir, read_only=True) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 4
        assert [one.name for one in ckpt.skipped] == ["step-00000005"]
    assert "manifest.json: is missing" in warnings(caplog)[0]


def test_save_that_was_broken_off_is_no_checkpoint_and_is_told_once(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stager")
    save(run_dir, STATE, step=5)
    (run_dir / "step-00000005" / "manifest.json").unlink()
    (run_dir / "step-00000005").rename(run_dir / "step-00000005.partial-ab")
    save(run_dir, STATE, step=4)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        for _ in range(2):
            loaded = ckpt.load()
            assert loaded is not None and loaded.step == 4
    told = [text for text in warnings(caplog, logging.INFO) if "was begun and is not whole" in text]
    assert len(told) == 1 and told[0].startswith("step 5 ") and told[0].endswith("step 4 is loaded")
    shutil.rmtree(run_dir / "step-00000004")
    caplog.clear()
    assert load(run_dir) is None
    assert not warnings(caplog)
    shutil.rmtree(run_dir / "step-00000005.partial-ab")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_checkpoints_of_dcp_save_are_none_and_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run_dir / "step-00000005"
    dcp.save(STATE, checkpoint_id=path, no_dist=True)
    assert load(run_dir) is None
    said = f"step-00000005 (torch.distributed.checkpoint.save): load_checkpoint({str(path)!r})"
    assert said in warnings(caplog)[-1]
    assert torch.equal(load_checkpoint(path).state["v"], STATE["v"])
    path.rename(run_dir / "other")
    caplog.clear()
    assert load(run_dir) is None
    assert f"load_checkpoint({str(run_dir / 'other')!r})" in warnings(caplog)[-1]
    caplog.clear()
    assert load(run_dir / "other") is None
    assert "the directory itself (torch.distributed.checkpoint.save): load_checkpoint(" in warnings(caplog)[-1]
    assert f"load_checkpoint({str(run_dir / 'other')!r})" in warnings(caplog)[-1]


@pytest.mark.parametrize("name", ["model.pt", "state.pt", "model.safetensors"])
def test_files_are_none_and_named(run_dir: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.mkdir()
    save_file(STATE, run_dir / name) if name.endswith("s") else torch.save(STATE, run_dir / name)
    assert load(run_dir) is None
    said = (
        f"{name} (torch.save): load_checkpoint({str(run_dir / name)!r})"
        if name.endswith(".pt")
        else f"the directory itself (safetensors): load_checkpoint({str(run_dir)!r})"
    )
    assert warnings(caplog)[0].endswith(said)


def test_file_of_torch_save_in_a_directory_of_a_step_is_not_ours(run_dir: Path) -> None:
    (run_dir / "step-00000005").mkdir(parents=True)
    torch.save(STATE, run_dir / "step-00000005" / "state.pt")
    assert load(run_dir) is None


def test_parent_of_a_run_and_a_renamed_checkpoint_are_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(save(run_dir, STATE, step=5).path)
    assert load(run_dir.parent) is None
    assert f"(the directory of a run): Checkpointer({str(run_dir)!r})" in warnings(caplog)[0]
    path.rename(run_dir / "best")
    caplog.clear()
    assert load(run_dir) is None
    assert f"(a checkpoint that was renamed): load_checkpoint({str(run_dir / 'best')!r})" in warnings(caplog)[0]


def test_nothing_is_told_of_an_empty_run(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.mkdir()
    (run_dir / "log.txt").touch()
    (run_dir / "src").mkdir()
    assert load(run_dir) is None
    assert not warnings(caplog)


def test_nothing_of_a_removed_checkpoint_with_objects_stays(run_dir: Path) -> None:
    path = save(run_dir, {**STATE, "lr": 0.1}, step=5, kind="safetensors").path
    assert "objects.bin" in os.listdir(path)
    assert remove_own(path) is None
    assert not os.path.exists(path)
