"""``dcp.save`` and ``dcp.load`` through stager's writer and reader, alone and with torch's on the other side."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from stager import Checkpointer, DefaultStager, StagingOptions
from stager.torch_api.storage import StagerStorageReader, StagerStorageWriter, assembly, spans, writer
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.states import same
from tests.storage.states import NOT_STOCKS, READERS, WRITERS, blank, load, save, state_for_dcp


@pytest.mark.parametrize("written_by", ["stock", "ours"])
@pytest.mark.parametrize("read_by", ["stock", "ours"])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, written_by: str, read_by: str) -> None:
    state = state_for_dcp(1)
    for key in NOT_STOCKS if (written_by, read_by) != ("ours", "ours") else ():
        del state[key]
    save(state, WRITERS[written_by](tmp_path / "checkpoint"))
    loaded = load(blank(state), READERS[read_by](tmp_path / "checkpoint"))
    assert all(same(loaded[key], state[key]) for key in state if key != "conj")
    assert torch.equal(loaded["conj"], state["conj"])  # as complex numbers: which bits are negated is not kept
    if written_by == "ours":
        assert verify_checkpoint(tmp_path / "checkpoint").problems == ()


def test_several_files_and_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SMALLEST_FILE_BYTES", 1 << 10)
    for module in (spans, assembly):
        monkeypatch.setattr(module, "SEGMENT_BYTES", 100_000)
    monkeypatch.setattr(spans, "_WRITE_BYTES", 7_000)
    sizes = [0, 1, 15_000, 16_000, 24_000, 25_000, 26_000, 250_000]
    state = {"t": {str(n): torch.arange(float(n)) for n in sizes}, "object": {"a": "x" * 300_000}}
    save(state, StagerStorageWriter(tmp_path / "c", num_threads=3, fsync=False))
    manifest = read_manifest(tmp_path / "c")
    assert [file.name for file in manifest.layout.files] == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    assert max(map(len, manifest.hashes)) == 11
    assert verify_checkpoint(tmp_path / "c").problems == ()
    for reader in (dcp.FileSystemReader, StagerStorageReader):
        assert same(load(blank(state), reader(tmp_path / "c")), state)


@pytest.mark.parametrize("verify", [True, False])
def test_targets_of_another_dtype_stride_or_sharing_memory(tmp_path: Path, verify: bool) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    state = {"a": matrix, "b": matrix.clone(), "c": matrix + 1, "d": matrix + 2, "e": matrix.t()}
    save(state, StagerStorageWriter(tmp_path / "c"))
    tied = torch.zeros(3, 4)
    target = {
        "a": torch.zeros(3, 4, dtype=torch.float64),
        "b": torch.zeros(4, 3).t(),
        "c": tied,
        "d": tied,
        "e": torch.zeros(4, 3, requires_grad=True),
    }
    version = target["e"]._version
    load(target, StagerStorageReader(tmp_path / "c", num_threads=3, verify=verify))
    assert torch.equal(target["a"], matrix.double())
    assert torch.equal(target["b"], matrix)
    assert torch.equal(tied, matrix + 2)
    assert torch.equal(target["e"], matrix.t())
    assert target["e"]._version > version  # autograd sees the change


def test_more_than_a_batch_beside_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stager.loading.dcp.read_plan._BATCH_BYTES", 100)
    state = {str(n): torch.full((n,), float(n)) for n in range(1, 40)}
    save(state, StagerStorageWriter(tmp_path / "c"))
    target = {key: torch.zeros(len(value), dtype=torch.float64) for key, value in state.items()}
    load(target, StagerStorageReader(tmp_path / "c"))
    assert all(torch.equal(target[key], state[key].double()) for key in state)


def test_checkpoint_named_after_a_step_is_one_of_checkpointers(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(5.0)}, "list": [torch.ones(2), 3], "lr": 0.1}
    save(state, StagerStorageWriter(tmp_path / "run" / "step-00000012"))
    with Checkpointer(tmp_path / "run", read_only=True) as checkpointer:
        loaded = checkpointer.load()
    assert loaded is not None
    assert loaded.step == 12
    assert same(loaded.state, state)


def test_checkpointers_own_are_read(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    state = {"model": {"a": tied, "b": tied}, "note": ("x", 1)}
    with Checkpointer(tmp_path / "run") as checkpointer:
        path = checkpointer.save(3, state).upload_completion.result().path
    assert same(load(blank(state), StagerStorageReader(path)), state)


def test_stock_conversion_needs_no_target(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(5.0)}, "list": [torch.ones(2), 3]}
    save(state, StagerStorageWriter(tmp_path / "c"))
    dcp_to_torch_save(tmp_path / "c", tmp_path / "c.pt")
    assert same(torch.load(tmp_path / "c.pt"), state)
    empty: dict[str, Any] = {}
    planner = dcp.default_planner._EmptyStateDictLoadPlanner()
    dcp.state_dict_loader._load_state_dict(empty, StagerStorageReader(tmp_path / "c"), planner=planner, no_dist=True)
    assert same(empty, state)


def test_async_save_with_our_stager(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1000), "step": 0}
    uploads = []
    with DefaultStager(StagingOptions(False, True, True, False, use_leases=True)) as stager:
        for step in range(4):
            state["w"].fill_(step)
            state["step"] = step
            target = StagerStorageWriter(tmp_path / str(step))
            response = dcp.async_save(state, storage_writer=target, async_stager=stager)
            response.staging_completion.result()
            uploads.append(response.upload_completion)
        for upload in uploads:
            upload.result()
    for step in range(4):
        assert verify_checkpoint(tmp_path / str(step)).ok
        loaded = load({"w": torch.ones(1000), "step": -1}, StagerStorageReader(tmp_path / str(step)))
        assert torch.equal(loaded["w"], torch.full((1000,), float(step)))
        assert loaded["step"] == step


def test_one_writer_and_one_reader_for_many_checkpoints(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(StagerStorageWriter(tmp_path / "none")))  # as torch sends it to a process
    reader = StagerStorageReader(tmp_path / "none")
    save_ids = set()
    for step in range(3):
        dcp.save({"w": torch.full((3,), float(step))}, storage_writer=source, checkpoint_id=tmp_path / str(step))
        target = {"w": torch.zeros(3)}
        dcp.load(target, storage_reader=reader, checkpoint_id=tmp_path / str(step))
        assert torch.equal(target["w"], torch.full((3,), float(step)))
        save_ids.add(read_manifest(tmp_path / str(step)).header.save_id)
        assert source.save_id in save_ids  # public, as that of stock's writer
    assert len(save_ids) == 3
    assert not (tmp_path / "none").exists()


def test_ids_are_public_as_stock_s_are_and_new_for_each_save_and_load(tmp_path: Path) -> None:
    writer, reader = StagerStorageWriter(tmp_path / "a"), StagerStorageReader(tmp_path / "a")
    stock_writer, stock_reader = dcp.FileSystemWriter(tmp_path / "b"), dcp.FileSystemReader(tmp_path / "b")
    saved, loaded = [], []
    for _ in range(2):  # without a checkpoint_id, DCP does not call reset()
        dcp.save({"w": torch.ones(3)}, storage_writer=writer)
        assert writer.save_id == read_manifest(tmp_path / "a").header.save_id == writer.storage_meta().save_id
        saved.append(writer.save_id)
        dcp.load({"w": torch.zeros(3)}, storage_reader=reader, checkpoint_id=tmp_path / "a")
        assert reader.read_metadata().storage_meta.load_id == reader.load_id
        loaded.append(reader.load_id)
    assert len({*saved, *loaded}) == 4
    assert isinstance(stock_writer.save_id, str) and isinstance(stock_reader.load_id, str)


def test_planner_that_does_not_flatten(tmp_path: Path) -> None:
    state = {"a.b": torch.arange(3.0), "a": {"c": 1}}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=StagerStorageWriter(tmp_path / "c"), planner=planner)
    target = {"a.b": torch.zeros(3)}
    loader = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(target, storage_reader=StagerStorageReader(tmp_path / "c"), planner=loader)
    assert torch.equal(target["a.b"], state["a.b"])
    assert [path for path, _ in read_manifest(tmp_path / "c").paths()] == [("a.b",), ("a",)]
