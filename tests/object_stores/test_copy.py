"""Copies between places: whole or not there, and what is damaged is not copied."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typer.testing import CliRunner

from stager import (
    Checkpointer,
    CorruptCheckpointError,
    DirectoryInUseError,
    UsageError,
    copy_checkpoints,
    load_checkpoint,
    verify,
)
from stager.cli.app import app
from stager.workers.checkpoint.directory.run_directory import committed_steps, partial_names
from stager.workers.checkpoint.storage.posix.local_file import LocalFile
from tests.object_stores.test_checkpointer import LEFT, objects, state_of
from tests.states import same


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run of three checkpoints in a file system."""
    directory = str(tmp_path / "gpt")
    with Checkpointer(directory) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state_of(step), files={"config.json": b"{}"}, metrics={"loss": 1.0 / step})
    return directory


def test_there_and_back(run: str, tmp_path: Path, run_url: str) -> None:
    back = str(tmp_path / "back")
    for source, destination in ((run, run_url), (run_url, back)):
        report = copy_checkpoints(source, destination, every=True)
        assert [info.step for info in report.copied] == [1, 2, 3] and report.there == ()
    for step in (1, 2, 3):
        path = f"{back}/step-{step:08d}"
        assert verify(path, strict=True).ok
        loaded = load_checkpoint(path)
        assert same(loaded.state, state_of(step)) and loaded.files["config.json"] == b"{}"
        assert loaded.info is not None and loaded.info.metrics == {"loss": 1.0 / step}
        assert sorted(os.listdir(path)) == sorted(os.listdir(f"{run}/step-{step:08d}"))
    assert not any(map(LEFT.search, objects(run_url)))


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_each_format_is_stock_again(tmp_path: Path, run_url: str, kind: str) -> None:
    with Checkpointer(run_url, config={"persistence": {"format": kind}}) as ckpt:
        ckpt.save(7, {"weight": torch.arange(5000.0)})
    report = copy_checkpoints(run_url, tmp_path / "here")
    (info,) = report.copied
    if kind == "dcp":
        dcp_to_torch_save(info.path, tmp_path / "one.pt")
        assert torch.equal(torch.load(tmp_path / "one.pt")["weight"], torch.arange(5000.0))
        assert dcp.FileSystemReader(info.path).read_metadata().state_dict_metadata
    elif kind == "torch":
        assert torch.equal(torch.load(f"{info.path}/state.pt", mmap=True)["weight"], torch.arange(5000.0))
    else:
        from safetensors.torch import load_file

        assert torch.equal(load_file(f"{info.path}/state.safetensors")["weight"], torch.arange(5000.0))


def test_a_copy_goes_on_where_it_was_interrupted(run: str, run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., int] = LocalFile.read_into
    left = 4  # each checkpoint has three files, each of one block

    def fails_in_the_end(self: LocalFile, buffer: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return read(self, buffer, offset)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFile, "read_into", fails_in_the_end)
        copy_checkpoints(run, run_url, every=True)
    done = committed_steps(run_url)
    assert 0 < len(done) < 3
    report = copy_checkpoints(run, run_url, every=True)
    assert [info.step for info in report.copied] == [step for step in (1, 2, 3) if step not in done]
    assert len(report.there) == len(done)
    assert committed_steps(run_url) == [3, 2, 1] and partial_names(run_url) == []
    assert all(verify(f"{run_url}/step-{step:08d}").ok for step in (1, 2, 3))


def test_what_is_damaged_is_not_copied(run: str, run_url: str) -> None:
    file = Path(run, "step-00000002", "__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match=r"step-00000002/__0_0\.distcp.*damaged"):
        copy_checkpoints(run, run_url, every=True)
    assert committed_steps(run_url) == [1]
    assert [info.step for info in copy_checkpoints(run, run_url).copied] == [3]
    assert committed_steps(run_url) == [3, 1] and partial_names(run_url) == []


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.9999])
def test_large_tensors_of_many_segments(tmp_path: Path, run_url: str, place: float) -> None:
    """Segments end within the blocks that are read, and across them; damage in any of them is found."""
    state = {"large": torch.arange(5_300_000.0), "empty": torch.empty(0), "last": torch.ones(3)}
    run = tmp_path / "large"
    with Checkpointer(run, config={"persistence": {"segment_bytes": "3MiB"}, "workers": {"count": 1}}) as ckpt:
        info = ckpt.save(1, state).upload_completion.result()
    copy_checkpoints(run, run_url)
    assert same(load_checkpoint(f"{run_url}/step-00000001").state, state)
    file = Path(info.path, "__0_0.distcp")
    with open(file, "r+b") as damaged:
        damaged.seek(int(place * (file.stat().st_size - 1)))
        byte = damaged.read(1)
        damaged.seek(-1, os.SEEK_CUR)
        damaged.write(bytes([byte[0] ^ 4]))
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        copy_checkpoints(run, f"{run_url}-again")


def test_a_run_that_goes_on_with_a_copy(run: str, run_url: str) -> None:
    copy_checkpoints(run, run_url, step=2)
    with Checkpointer(run_url) as ckpt:
        with pytest.raises(DirectoryInUseError):
            copy_checkpoints(run, run_url)
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2
        ckpt.save(3, state_of(30))
    assert copy_checkpoints(run, run_url, replace=True).copied[0].step == 3  # another save of this step
    assert same(load_checkpoint(f"{run_url}/step-00000003").state, state_of(3))


def test_arguments_that_cannot_be_meant(run: str, run_url: str) -> None:
    with pytest.raises(UsageError, match="step and every"):
        copy_checkpoints(run, run_url, step=1, every=True)
    with pytest.raises(UsageError, match="name the directory of the run"):
        copy_checkpoints(run, f"{run}/step-00000001")


def test_command(run: str, run_url: str) -> None:
    first = CliRunner().invoke(app, ["copy", f"{run}/step-00000001", run_url])
    assert first.exit_code == 0 and first.stdout == f"copied {run_url}/step-00000001\n"
    rest = CliRunner().invoke(app, ["copy", run, run_url, "--all", "--json"])
    found = json.loads(rest.stdout)
    assert [info["step"] for info in found["copied"]] == [2, 3] and found["there"] == ["step-00000001"]
    assert CliRunner().invoke(app, ["copy", f"{run}/nothing", run_url]).exit_code == 1


def test_another_checkpoint_of_the_same_name_is_replaced_only_on_demand(run: str, tmp_path: Path, run_url: str) -> None:
    for destination in (run_url, str(tmp_path / "other")):
        with Checkpointer(destination) as ckpt:
            ckpt.save(2, {"own": torch.ones(3)})
        with pytest.raises(UsageError, match=r"is another checkpoint .* nothing was copied.*--replace"):
            copy_checkpoints(run, destination, every=True)
        assert committed_steps(destination) == [2]
        assert "own" in load_checkpoint(f"{destination}/step-00000002").state
        result = CliRunner().invoke(app, ["copy", run, destination, "--all", "--replace"])
        assert result.exit_code == 0, result.output
        assert committed_steps(destination) == [3, 2, 1]
        assert same(load_checkpoint(f"{destination}/step-00000002").state, state_of(2))


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(
    run: str, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Callable[..., int] = LocalFile.read_into

    def removes_it_first(self: LocalFile, buffer: memoryview, offset: int) -> int:
        if Path(f"{run}/step-00000002").exists() and committed_steps(run_url) == [1]:
            shutil.rmtree(f"{run}/step-00000002")
            raise OSError(errno.ENOENT, "gone")
        return read(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", removes_it_first)
    report = copy_checkpoints(run, run_url, every=True)
    assert [info.step for info in report.copied] == [1, 3]
    assert partial_names(run_url) == []


def test_all_of_one_checkpoint_is_refused(run: str, run_url: str) -> None:
    with pytest.raises(UsageError, match="is one checkpoint; leave every"):
        copy_checkpoints(f"{run}/step-00000002", run_url, every=True)
