"""Checkpoints that stock torch wrote, and hostile ones that look like them."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StagerError,
    StateMismatchError,
    UnsafePickleError,
    UsageError,
    load_checkpoint,
)
from tests.cli.conftest import Outcome
from tests.exporting.sharded import chunked_checkpoint
from tests.persistence.tasks import save
from tests.states import everything, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch.load's own way with quantized tensors
]


def small_state() -> dict[str, Any]:
    return {
        "w": torch.randn(5, 3),
        "nested": {"list": [torch.arange(4), {"h": torch.ones(2).bfloat16()}], "n": 3},
        "t": torch.randn(3, 4).t(),
        "none": torch.empty(0, 2),
    }


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    path = tmp_path / "stock"
    dcp.save(small_state(), checkpoint_id=path, no_dist=True)
    return path


def test_torch_save_is_read_as_torch_load_reads_it(tmp_path: Path) -> None:
    state = everything()
    torch.save(state, tmp_path / "a.pt")
    assert same(load_checkpoint(tmp_path / "a.pt").state, torch.load(tmp_path / "a.pt", weights_only=True))
    torch.save([1, torch.ones(2)], tmp_path / "list.pt")
    assert load_checkpoint(tmp_path / "list.pt").step is load_checkpoint(tmp_path / "list.pt").info is None
    assert same(load_checkpoint(tmp_path / "list.pt").state, [1, torch.ones(2)])
    with pytest.raises(UsageError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt", {})


def test_dcp_save_is_read_with_its_nesting(tmp_path: Path) -> None:
    state = small_state()
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    assert same(load_checkpoint(tmp_path / "stock").state, state)


def test_own_checkpoint_is_read_by_its_path(run_dir: Path) -> None:
    state = everything()
    info = save(run_dir, state)
    path = info.path
    own = load_checkpoint(path)
    assert same(own.state, state)
    assert (own.step, own.path, own.info) == (info.step, path, info)
    os.unlink(f"{path}/manifest.json")  # what is left is what dcp.save writes
    del state["ints"], state["plain"]["empty"]  # DCP makes strings of keys, and has no empty containers
    loaded = load_checkpoint(path).state
    assert all(same(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("origin", ["torch.save", "dcp", "stager"])
def test_into_keeps_identity_and_calls_load_state_dict(tmp_path: Path, origin: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loose": torch.randn(3), "n": 7}
    path = tmp_path / "saved"
    if origin == "torch.save":
        torch.save(state, path)
    elif origin == "dcp":
        del state["optimizer"]  # DCP makes strings of the keys of its state
        dcp.save(state, checkpoint_id=path, no_dist=True)
    else:
        path = Path(save(path, state).path)
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    target: dict[str, Any] = {"model": other, "loose": torch.zeros(3), "n": 0}
    if origin != "dcp":
        target["optimizer"] = torch.optim.AdamW(other.parameters())
    loose, weight = target["loose"], other[0].weight
    assert load_checkpoint(path, target).state is target
    assert target["loose"] is loose and other[0].weight is weight and target["n"] == 7
    assert same(dict(other.state_dict()), dict(model.state_dict())) and same(loose, state["loose"])
    if origin != "dcp":
        first = next(iter(target["optimizer"].state.values()))
        assert same(first["exp_avg"], next(iter(optimizer.state.values()))["exp_avg"])


@pytest.mark.parametrize("origin", ["torch.save", "dcp"])
def test_what_does_not_fit_changes_nothing(tmp_path: Path, origin: str) -> None:
    state = {"a": torch.ones(3), "b": {"c": torch.ones(2)}}
    path = tmp_path / "saved"
    torch.save(state, path) if origin == "torch.save" else dcp.save(state, checkpoint_id=path, no_dist=True)
    target = {"a": torch.zeros(3), "b": {"c": torch.zeros(5), "d": torch.zeros(1)}}
    with pytest.raises(
        StateMismatchError, match=r"b\['c'\]: has shape \[5\] in the target and \[2\] in the checkpoint"
    ):
        load_checkpoint(path, target)
    assert not target["a"].any()
    target |= {"b": {"c": torch.zeros(2)}, "d": torch.zeros(1)}
    with pytest.raises(StateMismatchError, match=r"d: is in the target"):
        load_checkpoint(path, target)
    assert load_checkpoint(path, target, strict=False).missing == ("d",)
    assert target["a"].all() and target["b"]["c"].all()


def test_own_tensors_in_chunks_are_whole(tmp_path: Path) -> None:
    path, whole = chunked_checkpoint(tmp_path)
    loaded = load_checkpoint(path).state
    assert same({name: loaded[name] for name in whole}, whole) and loaded["n"] == 5
    target: dict[str, Any] = {name: torch.zeros(7, 6, 4) for name in whole}
    target["rows"] = torch.zeros(4, 6, 7).permute(2, 1, 0)
    load_checkpoint(path, target)
    assert same({name: target[name] for name in whole}, whole)
    with pytest.raises(StateMismatchError, match=r"rows: has shape"):
        load_checkpoint(path, {"rows": torch.zeros(2, 6, 4)})


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_code_runs_only_when_allowed(tmp_path: Path, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": RunsCode()}, "a.pt")
    dcp.save({"x": RunsCode(), "t": torch.ones(1)}, checkpoint_id="object", no_dist=True)
    (stock / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    for path in ("a.pt", "object", stock):
        with pytest.raises(UnsafePickleError, match="allow_pickle"):
            load_checkpoint(path)
        assert not os.path.exists("ran")
    load_checkpoint("a.pt", allow_pickle=True)
    assert os.path.exists("ran")


def change_metadata(stock: Path, change: Any) -> None:
    metadata = pickle.loads((stock / ".metadata").read_bytes())
    change(metadata)
    (stock / ".metadata").write_bytes(pickle.dumps(metadata))


def huge_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["w"] = dataclasses.replace(
        metadata.state_dict_metadata["w"], size=torch.Size([1 << 40, 3])
    )


def outside(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../stock/{info.relative_path}"


def beyond_the_end(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length += 1 << 40


def far_in_a_list(metadata: Any) -> None:
    metadata.planner_data["w"] = ("w", 1 << 40)


def same_bytes_many_times(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "w")
    for number in range(1000):
        name = f"w{number}"
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata["w"]
        metadata.storage_data[dataclasses.replace(index, fqn=name)] = metadata.storage_data[index]
        metadata.planner_data[name] = (name,)


def negative(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = -64


CHANGES = [huge_tensor, outside, beyond_the_end, far_in_a_list, same_bytes_many_times, negative]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_metadata_that_lies_is_refused_before_memory_is_taken(stock: Path, change: Any) -> None:
    change_metadata(stock, change)
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        load_checkpoint(stock)
    assert Outcome("inspect", stock).code == 1


def test_damaged_data_of_dcp_is_an_error(stock: Path) -> None:
    (data,) = stock.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(bytes(200) + whole[200:])
    with pytest.raises(StagerError, match="stock"):
        load_checkpoint(stock)
    data.write_bytes(whole[:100])
    with pytest.raises(CorruptCheckpointError, match="beyond the end"):
        load_checkpoint(stock)
    data.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"\.distcp: is missing, and \.metadata says"):
        load_checkpoint(stock)
    data.symlink_to("/etc/passwd")
    with pytest.raises(CorruptCheckpointError, match="not a regular file"):
        load_checkpoint(stock)


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"hello", bytes(1000), compressed()], ids=len)
def test_file_that_torch_save_did_not_write(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")
    assert Outcome("inspect", tmp_path / "a.pt").code == 1


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(tmp_path / "a.pt")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointNotFoundError):
            load_checkpoint(path)


def test_inspect_says_what_it_is(tmp_path: Path, stock: Path) -> None:
    torch.save({"a": {"b": torch.ones(2, 3)}, "n": 1}, tmp_path / "a.pt")
    answer = Outcome("inspect", tmp_path / "a.pt", "--json").json
    assert (answer["format"], answer["num_tensors"], answer["num_objects"]) == ("torch.save", 1, 1)
    (tensor,) = answer["tensors"]
    assert (tensor["key"], tensor["dtype"], tensor["shape"], tensor["nbytes"]) == ("a.b", "float32", [2, 3], 24)
    torch.save({"s": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    assert Outcome("inspect", tmp_path / "sparse.pt", "--json").json["num_tensors"] == 1
    answer = Outcome("inspect", stock, "--json", "--keys", "nested.*").json
    assert answer["format"] == "torch.distributed.checkpoint.save"
    assert [tensor["key"] for tensor in answer["tensors"]] == ["nested.list.0", "nested.list.1.h"]
    shown = Outcome("inspect", stock)
    assert shown.code == 0 and "torch.distributed.checkpoint.save" in shown.out and "nested.list.1.h" in shown.out
