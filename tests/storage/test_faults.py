"""What a failed save leaves, what may be replaced, and what a damaged or hostile checkpoint does when it is loaded."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager.torch_api.storage import StagerStorageReader, StagerStorageWriter
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UnsafePickleError,
    UnstageableError,
    UsageError,
)
from tests.states import same
from tests.storage.states import blank, failure, load, save


def small_state(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((40,), value), "m": {"x": torch.full((2, 3), value)}, "note": f"{value}"}


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("older", [StagerStorageWriter, dcp.FileSystemWriter])
def test_overwriting_replaces_the_whole_directory(
    tmp_path: Path, request: pytest.FixtureRequest, older: Any, exchange: bool
) -> None:
    if not exchange:
        request.getfixturevalue("no_exchange")
    save({**small_state(1.0), "more": torch.ones(3)}, older(tmp_path / "c"))
    (tmp_path / "c" / "__7_0.distcp").write_bytes(b"of a rank that is no more")
    save(small_state(2.0), StagerStorageWriter(tmp_path / "c"))
    assert same(load(blank(small_state()), StagerStorageReader(tmp_path / "c")), small_state(2.0))
    assert verify_checkpoint(tmp_path / "c").problems == ()  # no file of the older one is left
    assert os.listdir(tmp_path) == ["c"]


def test_overwrite_false_keeps_what_is_there(tmp_path: Path) -> None:
    save(small_state(1.0), StagerStorageWriter(tmp_path / "c", overwrite=False))
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(small_state(2.0), StagerStorageWriter(tmp_path / "c", overwrite=False))
    assert isinstance(failure(caught.value), UsageError)
    assert "overwrite=False" in str(failure(caught.value))
    assert same(load(blank(small_state()), StagerStorageReader(tmp_path / "c")), small_state(1.0))


def test_directory_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    save(small_state(1.0), StagerStorageWriter(tmp_path / "c"))
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(dcp.api.CheckpointException, match=r"notes\.txt"):
        save(small_state(2.0), StagerStorageWriter(tmp_path / "c"))
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


def test_file_at_the_path_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("mine")
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(small_state(), StagerStorageWriter(tmp_path / "c"))
    error = failure(caught.value)
    assert isinstance(error, StorageError)
    assert error.errno == errno.ENOTDIR
    assert (tmp_path / "c").read_text() == "mine"


class FailingPlanner(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "note":
            raise ValueError("no such value")
        return super().resolve_data(write_item)


def test_value_that_cannot_be_resolved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(dcp.api.CheckpointException, match="no such value"):
        dcp.save(small_state(), storage_writer=StagerStorageWriter(tmp_path / "c"), planner=FailingPlanner())
    assert os.listdir(tmp_path) == []


def test_value_that_cannot_be_pickled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any) -> None:
        raise RuntimeError("no such dtype")

    monkeypatch.setattr("stager.torch_api.storage.spans.header_and_tail", unknown)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save({"m": {"x": torch.ones(2)}}, StagerStorageWriter(tmp_path / "c"))
    error = failure(caught.value)
    assert isinstance(error, UnstageableError)
    assert error.key_path == "m.x"


@pytest.mark.parametrize("call", ["write_all", "write_atomically"])
def test_disk_full_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """While data is written, and while the commit is."""
    save(small_state(1.0), StagerStorageWriter(tmp_path / "c"))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(files, call, full)
        with pytest.raises(dcp.api.CheckpointException) as caught:
            save(small_state(2.0), StagerStorageWriter(tmp_path / "c"))
    error = failure(caught.value)
    assert isinstance(error, StorageError)
    assert error.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["c"]
    assert same(load(blank(small_state()), StagerStorageReader(tmp_path / "c")), small_state(1.0))
    save(small_state(3.0), StagerStorageWriter(tmp_path / "c"))
    assert same(load(blank(small_state()), StagerStorageReader(tmp_path / "c")), small_state(3.0))


def test_leftover_of_a_killed_save_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "c.partial-0").mkdir()
    (tmp_path / "c.partial-0" / "__0_0.distcp").write_bytes(b"half")
    save(small_state(), StagerStorageWriter(tmp_path / "c"))
    assert os.listdir(tmp_path) == ["c"]


def test_partial_directory_of_another_save_is_not_committed(tmp_path: Path) -> None:
    class Rival(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.index.fqn == "note":
                os.rename(tmp_path / "c.partial-0", tmp_path / "moved")
                os.mkdir(tmp_path / "c.partial-0")
            return super().resolve_data(write_item)

    with pytest.raises(dcp.api.CheckpointException, match="another save"):
        dcp.save(small_state(), storage_writer=StagerStorageWriter(tmp_path / "c"), planner=Rival())
    assert os.listdir(tmp_path) == ["moved"]


def test_collectives_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_collectives"):
        dcp.save(small_state(), storage_writer=StagerStorageWriter(tmp_path / "c"), use_collectives=False)
    assert os.listdir(tmp_path) == []


def test_flipped_bit_is_refused_and_named(tmp_path: Path) -> None:
    save(small_state(), StagerStorageWriter(tmp_path / "c"))
    data = tmp_path / "c" / "__0_0.distcp"
    whole = data.read_bytes()
    items = {path[0]: item for path, item in read_manifest(tmp_path / "c").paths()}
    layout = read_manifest(tmp_path / "c").layout
    for key, number in items.items():
        item = layout.items[number]
        for position in (item.offset, item.data_offset, item.offset + item.nbytes - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            data.write_bytes(damaged)
            with pytest.raises(dcp.api.CheckpointException) as caught:
                load(blank(small_state()), StagerStorageReader(tmp_path / "c"))
            error = failure(caught.value)
            assert isinstance(error, CorruptCheckpointError)
            assert str(key) in str(error)


def test_damage_may_be_ignored(tmp_path: Path) -> None:
    save(small_state(), StagerStorageWriter(tmp_path / "c"))
    manifest = read_manifest(tmp_path / "c")
    place = next(manifest.layout.items[n].data_offset for path, n in manifest.paths() if path == ("w",))
    with open(tmp_path / "c" / "__0_0.distcp", "r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    loaded = load(blank(small_state()), StagerStorageReader(tmp_path / "c", verify=False))
    assert loaded["w"][0] != 1
    assert torch.equal(loaded["w"][1:], torch.ones(39))
    assert loaded["note"] == "1.0"


@pytest.mark.parametrize("verify", [True, False])
def test_damaged_manifest_and_missing_or_short_files(tmp_path: Path, verify: bool) -> None:
    save(small_state(), StagerStorageWriter(tmp_path / "c"))
    reader = StagerStorageReader(tmp_path / "c", verify=verify)
    data, manifest = tmp_path / "c" / "__0_0.distcp", tmp_path / "c" / "manifest.json"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(CorruptCheckpointError, match="bytes long"):
        reader.read_metadata()
    data.unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        reader.read_metadata()
    data.write_bytes(whole)
    manifest.write_bytes(manifest.read_bytes().replace(b"float32", b"float16"))
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        reader.read_metadata()
    manifest.unlink()
    (tmp_path / "c" / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError):
        reader.read_metadata()


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    state = small_state()
    for writer in (StagerStorageWriter(tmp_path / "ours"), dcp.FileSystemWriter(tmp_path / "stock")):
        save({**state, "bomb": Bomb(mark)}, writer)
        path = writer.checkpoint_id
        with pytest.raises(dcp.api.CheckpointException) as caught:
            load({**blank(state), "bomb": None}, StagerStorageReader(path))
        assert isinstance(failure(caught.value), UnsafePickleError)
        assert not mark.exists()
        load({**blank(state), "bomb": None}, StagerStorageReader(path, allow_pickle=True))
        assert mark.exists()
        mark.rmdir()
    (tmp_path / "ours" / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    assert same(load(blank(state), StagerStorageReader(tmp_path / "ours")), state)
    (tmp_path / "stock" / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UnsafePickleError, match="mkdir"):
        StagerStorageReader(tmp_path / "stock").read_metadata()
    assert not mark.exists()


def test_stock_metadata_that_leads_outside_or_is_none(tmp_path: Path) -> None:
    save(small_state(), dcp.FileSystemWriter(tmp_path / "c"))
    index = tmp_path / "c" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../c/" + info.relative_path
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpointError, match="outside"):
        StagerStorageReader(tmp_path / "c").read_metadata()
    for data in (b"", b"\x80\x04]\x94.", pickle.dumps({"a": torch.Size([1])})):
        index.write_bytes(data)
        with pytest.raises(CorruptCheckpointError):
            StagerStorageReader(tmp_path / "c").read_metadata()
